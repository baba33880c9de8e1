_base_ = [
    '../_base_/models/oriented-rcnn_convnextv2.py',
    '../_base_/datasets/dota.py',
    '../_base_/schedules/adamw_12e.py',
    '../_base_/runtime_rotate.py',
    '../_base_/methods/liera.py',
]
default_hooks = dict(peft=_base_.peft)
