_base_ = [
    '../_base_/models/mask-rcnn_vit.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/adamw_12e.py',
    '../_base_/runtime_det.py',
    '../_base_/methods/frozen.py',
]
default_hooks = dict(peft=_base_.peft)
