# DINOv3's ViT-B/16, whose weights have a licence of their own, with ViTDet's pyramid for the heads
# of mmdet, mmseg and mmrotate. Another one of docs/backbones.md in a child, or by --cfg-options:
#   model = dict(
#       backbone=dict(name='vit_large_patch16_dinov3.lvd1689m'),
#       neck=dict(in_channels=1024))
vit = dict(
    backbone=dict(
        _delete_=True,
        type='mmpeft.TimmBackbone',
        name='vit_base_patch16_dinov3.lvd1689m',
        pretrained=True,
        out_indices=(-1,),
        drop_path=0.1,
    ),
    neck=dict(_delete_=True, type='mmpeft.SimpleFeaturePyramid', in_channels=768, num_outs=5),
)
