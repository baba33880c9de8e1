# UperNet on a small InternViT, its frozen weights in bfloat16, as in configs/*/internvit_ade20k.py.
_base_ = './ade20k.py'

# The maps of the four blocks are 16x16; the pyramid makes 32, 16, 8 and 4 of them.
width = 96
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmpeft.InternViT',
        arch=dict(depth=4, width=width, heads=3, hidden=384, image_size=40, patch_size=8),
        checkpoint='work_dirs/demo/base_internvit.pth',
        frozen_dtype='bfloat16',
        with_cp=True,
    ),
    neck=dict(
        type='Feature2Pyramid',
        embed_dim=width,
        rescales=[2, 1, 0.5, 0.25],
        norm_cfg=dict(type='mmpeft.LayerNorm2d'),
    ),
    decode_head=dict(in_channels=[width] * 4),
)

max_iters = 400
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=50, end=max_iters, eta_min=1e-5),
]
