# Mask R-CNN on ConvNeXt-V2-B. For L (widths 192 to 1536) or another network, override in a child:
#   model = dict(
#       backbone=dict(name='convnextv2_large.fcmae_ft_in22k_in1k'),
#       neck=dict(in_channels=[192, 384, 768, 1536]))
_base_ = 'mmdet::_base_/models/mask-rcnn_r50_fpn.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmpeft.TimmBackbone',
        name='convnextv2_base.fcmae_ft_in22k_in1k',
        pretrained=True,
        out_indices=(0, 1, 2, 3),
        drop_path=0.4,
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
