_base_ = [
    '../_base_/models/upernet_internvit.py',
    '../_base_/datasets/ade20k_504x504.py',
    '../_base_/schedules/adamw_80k.py',
    '../_base_/runtime_seg.py',
    '../_base_/methods/liera.py',
]
default_hooks = dict(peft=dict(_base_.peft, targets=dict(kinds=('linear',))))
