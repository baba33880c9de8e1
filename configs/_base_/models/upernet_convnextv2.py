# UperNet on ConvNeXt-V2-B. For L (widths 192 to 1536) or another network, override in a child:
#   model = dict(
#       backbone=dict(name='convnextv2_large.fcmae_ft_in22k_in1k'),
#       decode_head=dict(in_channels=[192, 384, 768, 1536]),
#       auxiliary_head=dict(in_channels=768))
_base_ = 'mmseg::_base_/models/upernet_swin.py'

model = dict(
    data_preprocessor=dict(size=(640, 640)),
    backbone=dict(
        _delete_=True,
        type='mmpeft.TimmBackbone',
        name='convnextv2_base.fcmae_ft_in22k_in1k',
        pretrained=True,
        out_indices=(0, 1, 2, 3),
        drop_path=0.4,
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024], num_classes=150),
    auxiliary_head=dict(in_channels=512, num_classes=150),
    test_cfg=dict(mode='slide', crop_size=(640, 640), stride=(426, 426)),
)
