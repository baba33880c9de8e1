# Oriented R-CNN on EfficientNet-Lite0, pretrained on ImageNet-1k, and scenes of photos.
_base_ = '../dota.py'

model = dict(
    data_preprocessor=dict(mean=_base_.photo_mean, std=_base_.photo_std),
    backbone=dict(_delete_=True, type='mmpeft.TimmBackbone', **_base_.photo_backbone),
    neck=dict(in_channels=_base_.photo_widths),
    roi_head=dict(bbox_head=dict(num_classes=8)),
)

dataset = dict(
    data_root='data/photos/dota/',
    metainfo=dict(classes=_base_.photo_classes, palette=_base_.photo_palette),
)
train_dataloader = dict(dataset=dataset)
val_dataloader = dict(dataset=dataset)
test_dataloader = val_dataloader
