# Oriented R-CNN (le90) on ConvNeXt-V2-B: Faster R-CNN whose proposals and boxes are rotated, as in
# mmrotate's oriented-rcnn-le90_r50_fpn_1x_dota. For L (widths 192 to 1536), override in a child:
#   model = dict(
#       backbone=dict(name='convnextv2_large.fcmae_ft_in22k_in1k'),
#       neck=dict(in_channels=[192, 384, 768, 1536]))
_base_ = 'mmdet::_base_/models/faster-rcnn_r50_fpn.py'

angle_version = 'le90'
model = dict(
    data_preprocessor=dict(boxtype2tensor=False),
    backbone=dict(
        _delete_=True,
        type='mmpeft.TimmBackbone',
        name='convnextv2_base.fcmae_ft_in22k_in1k',
        pretrained=True,
        out_indices=(0, 1, 2, 3),
        drop_path=0.4,
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
    rpn_head=dict(
        type='mmrotate.OrientedRPNHead',
        anchor_generator=dict(use_box_type=True),
        bbox_coder=dict(
            _delete_=True,
            type='mmrotate.MidpointOffsetCoder',
            angle_version=angle_version,
            target_means=[0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            target_stds=[1.0, 1.0, 1.0, 1.0, 0.5, 0.5],
        ),
        loss_bbox=dict(_delete_=True, type='SmoothL1Loss', beta=1 / 9, loss_weight=1.0),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(
            type='mmrotate.RotatedSingleRoIExtractor',
            roi_layer=dict(
                _delete_=True, type='RoIAlignRotated', out_size=7, sample_num=2, clockwise=True
            ),
        ),
        bbox_head=dict(
            predict_box_type='rbox',
            num_classes=15,
            reg_predictor_cfg=dict(type='mmdet.Linear'),
            cls_predictor_cfg=dict(type='mmdet.Linear'),
            reg_class_agnostic=True,
            bbox_coder=dict(
                _delete_=True,
                type='mmrotate.DeltaXYWHTRBBoxCoder',
                angle_version=angle_version,
                norm_factor=None,
                edge_swap=True,
                proj_xy=True,
                target_means=(0.0, 0.0, 0.0, 0.0, 0.0),
                target_stds=(0.1, 0.1, 0.2, 0.2, 0.1),
            ),
            loss_bbox=dict(_delete_=True, type='SmoothL1Loss', beta=1.0, loss_weight=1.0),
        ),
    ),
    train_cfg=dict(
        rpn=dict(
            assigner=dict(iou_calculator=dict(type='mmrotate.RBbox2HBboxOverlaps2D')),
            allowed_border=0,
        ),
        rpn_proposal=dict(max_per_img=2000, nms=dict(iou_threshold=0.8)),
        rcnn=dict(assigner=dict(iou_calculator=dict(type='mmrotate.RBboxOverlaps2D'))),
    ),
    test_cfg=dict(
        rpn=dict(nms_pre=2000, max_per_img=2000, nms=dict(iou_threshold=0.8)),
        rcnn=dict(
            nms_pre=2000,
            min_bbox_size=0,
            nms=dict(type='nms_rotated', iou_threshold=0.1),
            max_per_img=2000,
        ),
    ),
)
