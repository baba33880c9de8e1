_base_ = [
    '../_base_/models/upernet_vit.py',
    '../_base_/datasets/ade20k_640x640.py',
    '../_base_/schedules/adamw_160k.py',
    '../_base_/runtime_seg.py',
    '../_base_/methods/frozen.py',
]
default_hooks = dict(peft=_base_.peft)
