# DINO on a plain vision transformer: four levels of its pyramid, from a stride of 8.
_base_ = [
    'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py',
    '../_base_/models/vit.py',
    '../_base_/methods/frozen.py',
]

model = dict(
    data_preprocessor=dict(pad_size_divisor=32),
    backbone=_base_.vit.backbone,
    neck=dict(
        _delete_=True,
        type='mmpeft.SimpleFeaturePyramid',
        in_channels=768,
        scales=(2, 1, 0.5),
        num_outs=4,
    ),
)
# Upstream's 0.1 is for pretrained weights that train, not for adapters.
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=1.0))))
default_hooks = dict(peft=_base_.peft)
