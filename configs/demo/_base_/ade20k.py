# UperNet on the demo's small ConvNeXt-V2; a class for the background and one for each digit.
_base_ = [
    '../../_base_/models/upernet_convnextv2.py',
    '../../_base_/runtime_seg.py',
    './schedule.py',
]

classes = ('background', *_base_.digits)
norm_cfg = dict(type='GN', num_groups=8)
model = dict(
    data_preprocessor=dict(size=(128, 128)),
    backbone=_base_.backbone,
    decode_head=dict(
        in_channels=_base_.backbone_widths,
        channels=64,
        num_classes=11,
        norm_cfg=norm_cfg,
        # The background fills most pixels and would be all that is learnt for a long time.
        loss_decode=dict(class_weight=[0.2] + [1.0] * 10),
    ),
    auxiliary_head=None,
    test_cfg=dict(_delete_=True, mode='whole'),
)

dataset = dict(
    type='BaseSegDataset',
    data_root='data/digits/ade20k/',
    metainfo=dict(classes=classes, palette=[(90, 90, 90), *_base_.digit_palette]),
    reduce_zero_label=True,
)
train_dataset = dict(
    data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
    pipeline=[
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations'),
        dict(type='PackSegInputs'),
    ],
    **dataset,
)
val_dataset = dict(
    data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation'),
    pipeline=train_dataset['pipeline'],
    test_mode=True,
    **dataset,
)
train_dataloader = dict(dataset=train_dataset)
val_dataloader = dict(dataset=val_dataset)
test_dataloader = dict(dataset=val_dataset)
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator

default_hooks = _base_.demo_hooks
