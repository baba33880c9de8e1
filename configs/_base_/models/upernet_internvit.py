# UperNet on InternViT-6B, held in bfloat16. The pyramid of transposed convolutions is the recipe of
# InternVL. For the 300M model override in a child:
#   model = dict(
#       backbone=dict(arch='300m', checkpoint='pretrained/InternViT-300M-448px'),
#       neck=dict(embed_dim=1024),
#       decode_head=dict(in_channels=[1024] * 4, channels=512),
#       auxiliary_head=dict(in_channels=1024, channels=256))
_base_ = 'mmseg::_base_/models/upernet_r50.py'

norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    pretrained=None,
    data_preprocessor=dict(size=(504, 504), test_cfg=dict(size_divisor=14)),
    backbone=dict(
        _delete_=True,
        type='mmpeft.InternViT',
        arch='6b-224px',
        # A folder or an index of safetensors shards, or one file; see docs/internvit.md.
        checkpoint='pretrained/InternViT-6B-224px',
        drop_path=0.4,
        with_cp=True,
        frozen_dtype='bfloat16',
    ),
    neck=dict(
        type='Feature2Pyramid',
        embed_dim=3200,
        rescales=[4, 2, 1, 0.5],
        norm_cfg=dict(type='mmpeft.LayerNorm2d', eps=1e-6),
    ),
    decode_head=dict(in_channels=[3200] * 4, channels=1536, num_classes=150),
    auxiliary_head=dict(in_channels=3200, channels=1536, num_classes=150),
    test_cfg=dict(mode='slide', crop_size=(504, 504), stride=(322, 322)),
)
