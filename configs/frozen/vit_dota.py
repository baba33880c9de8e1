_base_ = [
    '../_base_/models/oriented-rcnn_vit.py',
    '../_base_/datasets/dota.py',
    '../_base_/schedules/adamw_12e.py',
    '../_base_/runtime_rotate.py',
    '../_base_/methods/frozen.py',
]
model = dict(backbone=dict(name='vit_large_patch16_dinov3.sat493m'), neck=dict(in_channels=1024))
default_hooks = dict(peft=_base_.peft)
