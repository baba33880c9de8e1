# Mask R-CNN on a plain vision transformer, as in ViTDet (arXiv:2203.16527).
_base_ = ['mmdet::_base_/models/mask-rcnn_r50_fpn.py', './vit.py']

model = dict(backbone=_base_.vit.backbone, neck=_base_.vit.neck)
