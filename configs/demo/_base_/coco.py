# Mask R-CNN on the demo's small ConvNeXt-V2 and its scenes of digits, 128 pixels wide.
_base_ = [
    '../../_base_/models/mask-rcnn_convnextv2.py',
    '../../_base_/runtime_det.py',
    './schedule.py',
]

width = 64
norm_cfg = dict(type='GN', num_groups=8)
roi_layer = dict(sampling_ratio=1)
model = dict(
    backbone=_base_.backbone,
    neck=dict(
        in_channels=_base_.backbone_widths, out_channels=width, num_outs=4, norm_cfg=norm_cfg
    ),
    rpn_head=dict(
        in_channels=width,
        feat_channels=width,
        anchor_generator=dict(scales=[3.0, 4.5], strides=[4, 8, 16, 32]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=width, roi_layer=roi_layer),
        bbox_head=dict(
            in_channels=width, fc_out_channels=256, num_classes=10, reg_class_agnostic=True
        ),
        mask_roi_extractor=dict(out_channels=width, roi_layer=roi_layer),
        mask_head=dict(
            num_convs=2,
            in_channels=width,
            conv_out_channels=width,
            num_classes=10,
            class_agnostic=True,
            norm_cfg=norm_cfg,
        ),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=128)),
        rpn_proposal=dict(nms_pre=200, max_per_img=100),
        rcnn=dict(sampler=dict(num=64)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=50), rcnn=dict(max_per_img=20)),
)

pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=(128, 128), keep_ratio=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
train_dataset = dict(
    type='CocoDataset',
    data_root='data/digits/coco/',
    ann_file='annotations/instances_train.json',
    data_prefix=dict(img='train/'),
    metainfo=dict(classes=_base_.digits, palette=_base_.digit_palette),
    pipeline=pipeline,
)
val_dataset = dict(
    type='CocoDataset',
    data_root='data/digits/coco/',
    ann_file='annotations/instances_val.json',
    data_prefix=dict(img='val/'),
    metainfo=dict(classes=_base_.digits, palette=_base_.digit_palette),
    pipeline=pipeline,
    test_mode=True,
)
train_dataloader = dict(dataset=train_dataset)
val_dataloader = dict(dataset=val_dataset)
test_dataloader = dict(dataset=val_dataset)
val_evaluator = dict(
    type='CocoMetric',
    ann_file='data/digits/coco/annotations/instances_val.json',
    metric=['bbox', 'segm'],
)
test_evaluator = val_evaluator

default_hooks = _base_.demo_hooks
visualizer = dict(line_width=1)
log_processor = dict(by_epoch=False)
