# RoI Transformer with ResNet-50, LieRA in every convolution.
_base_ = [
    'mmrotate::roi_trans/roi-trans-le90_r50_fpn_1x_dota.py',
    '../_base_/methods/liera.py',
]

model = dict(backbone=dict(frozen_stages=-1))  # would freeze the adapters there
default_hooks = dict(peft=_base_.peft)
