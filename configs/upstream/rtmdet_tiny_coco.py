# RTMDet-tiny, DoRA in all but the depthwise convolutions, which are no larger than their adapters.
_base_ = [
    'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
    '../_base_/methods/dora.py',
]

default_hooks = dict(peft=dict(_base_.peft, targets=dict(exclude_kinds=('depthwise',))))
