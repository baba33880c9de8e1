# RTMDet-tiny, DoRA in all but the depthwise convolutions, which are smaller than their adapters.
_base_ = [
    'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
    '../_base_/methods/dora.py',
]

targets = dict(_base_.peft.targets, exclude_kinds=('depthwise',))
default_hooks = dict(peft=dict(_base_.peft, targets=targets, unfreeze=()))
