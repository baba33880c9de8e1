# DOTA's patches below data/split_ss_dota (mmrotate's tools/data/dota/split); 16 images a step on
# 8 GPUs. --auto-scale-lr fits the rate to other batches.
_base_ = 'mmrotate::_base_/datasets/dota.py'

train_dataloader = dict(num_workers=4)
auto_scale_lr = dict(enable=False, base_batch_size=16)
