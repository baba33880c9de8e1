# Deformable DETR with Swin-T, LoRA in all linear layers and the patch embedding.
_base_ = [
    'mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py',
    './_base_/swin_t.py',
    '../_base_/methods/lora.py',
]

model = dict(backbone=_base_.swin_t, neck=dict(in_channels=[192, 384, 768]))
# Upstream's 0.1 is for pretrained weights that train, not for adapters.
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=1.0))))
# The norms on Swin's outputs are new: no pretrained file holds them.
default_hooks = dict(peft=dict(_base_.peft, unfreeze=(r'^norm[0-3]\.',)))
