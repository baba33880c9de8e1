# ADE20K below data/ade; 16 images a step on 8 GPUs. --auto-scale-lr fits the rate to other batches.
_base_ = 'mmseg::_base_/datasets/ade20k_640x640.py'

train_dataloader = dict(batch_size=2)
auto_scale_lr = dict(enable=False, base_batch_size=16)
