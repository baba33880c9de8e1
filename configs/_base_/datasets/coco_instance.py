# COCO below data/coco; 32 images a step on 8 GPUs. --auto-scale-lr fits the rate to other batches.
_base_ = 'mmdet::_base_/datasets/coco_instance.py'

train_dataloader = dict(batch_size=4, num_workers=4)
auto_scale_lr = dict(enable=False, base_batch_size=32)
