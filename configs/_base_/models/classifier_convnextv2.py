# A linear classifier on the pooled last map of ConvNeXt-V2-B. For L (width 1536) or another
# network, override in a child:
#   model = dict(
#       backbone=dict(name='convnextv2_large.fcmae_ft_in22k_in1k'), head=dict(in_channels=1536))
model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(
        type='ClsDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        to_rgb=True,
    ),
    backbone=dict(
        type='mmpeft.TimmBackbone',
        name='convnextv2_base.fcmae_ft_in22k_in1k',
        pretrained=True,
        out_indices=(3,),
        drop_path=0.1,
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=1024,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
    ),
)
