# Mask2Former for semantic segmentation on a plain vision transformer.
_base_ = [
    'mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py',
    '../_base_/models/vit.py',
    '../_base_/methods/frozen.py',
]

model = dict(
    backbone=_base_.vit.backbone,
    neck=dict(type='mmpeft.SimpleFeaturePyramid', in_channels=768),
    decode_head=dict(in_channels=[256] * 4),
)
# Upstream's 0.1 is for pretrained weights that train, not for adapters.
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=1.0))))
default_hooks = dict(peft=_base_.peft)
