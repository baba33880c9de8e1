# Oriented R-CNN on the demo's small ConvNeXt-V2 and its oriented boxes of digits.
_base_ = [
    '../../_base_/models/oriented-rcnn_convnextv2.py',
    '../../_base_/runtime_rotate.py',
    './schedule.py',
]

width = 64
model = dict(
    backbone=_base_.backbone,
    neck=dict(
        in_channels=_base_.backbone_widths,
        out_channels=width,
        num_outs=4,
        norm_cfg=dict(type='GN', num_groups=8),
    ),
    rpn_head=dict(
        in_channels=width,
        feat_channels=width,
        anchor_generator=dict(scales=[3.0, 4.5], strides=[4, 8, 16, 32]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=width, roi_layer=dict(sample_num=1)),
        bbox_head=dict(in_channels=width, fc_out_channels=256, num_classes=10),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=128)),
        rpn_proposal=dict(nms_pre=200, max_per_img=100),
        rcnn=dict(sampler=dict(num=64)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=50), rcnn=dict(nms_pre=200, max_per_img=20)),
)

pipeline = [
    dict(type='mmdet.LoadImageFromFile'),
    dict(type='mmdet.LoadAnnotations', with_bbox=True, box_type='qbox'),
    dict(type='ConvertBoxType', box_type_mapping=dict(gt_bboxes='rbox')),
    dict(type='mmdet.Resize', scale=(128, 128), keep_ratio=True),
    dict(
        type='mmdet.PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
train_dataset = dict(
    type='DOTADataset',
    data_root='data/digits/dota/',
    ann_file='train/annfiles/',
    data_prefix=dict(img_path='train/images/'),
    metainfo=dict(classes=_base_.digits, palette=_base_.digit_palette),
    pipeline=pipeline,
)
val_dataset = dict(
    type='DOTADataset',
    data_root='data/digits/dota/',
    ann_file='val/annfiles/',
    data_prefix=dict(img_path='val/images/'),
    metainfo=dict(classes=_base_.digits, palette=_base_.digit_palette),
    pipeline=pipeline,
    test_mode=True,
)
train_dataloader = dict(dataset=train_dataset)
val_dataloader = dict(dataset=val_dataset)
test_dataloader = dict(dataset=val_dataset)
val_evaluator = dict(type='DOTAMetric', metric='mAP')
test_evaluator = val_evaluator

default_hooks = _base_.demo_hooks
visualizer = dict(line_width=1)
log_processor = dict(by_epoch=False)
