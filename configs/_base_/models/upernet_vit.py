# UperNet on a plain vision transformer.
_base_ = ['./upernet_convnextv2.py', './vit.py']

model = dict(
    data_preprocessor=dict(test_cfg=dict(size_divisor=32)),
    backbone=_base_.vit.backbone,
    neck=dict(type='mmpeft.SimpleFeaturePyramid', in_channels=768),
    decode_head=dict(in_channels=[256] * 4),
    auxiliary_head=dict(in_channels=256),
)
