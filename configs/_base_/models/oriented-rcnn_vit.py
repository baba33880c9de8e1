# Oriented R-CNN (le90) on DINOv3's ViT-L/16 for satellite images, whose normalisation is its own.
_base_ = ['./oriented-rcnn_convnextv2.py', './vit.py']

model = dict(
    data_preprocessor=dict(mean=[109.65, 104.805, 75.48], std=[54.315, 39.78, 36.465]),
    backbone=_base_.vit.backbone,
    neck=_base_.vit.neck,
)
