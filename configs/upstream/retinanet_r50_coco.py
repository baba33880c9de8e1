# RetinaNet with ResNet-50, FLoRA in the stages that upstream does not freeze.
_base_ = [
    'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
    '../_base_/methods/flora.py',
]

targets = dict(exclude=(r'^conv1', r'^layer1'))  # frozen_stages=1
default_hooks = dict(peft=dict(_base_.peft, targets=targets))
