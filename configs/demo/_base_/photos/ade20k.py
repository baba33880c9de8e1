# UperNet on EfficientNet-Lite0, pretrained on ImageNet-1k, and scenes of photos.
_base_ = '../ade20k.py'

model = dict(
    data_preprocessor=dict(mean=_base_.photo_mean, std=_base_.photo_std),
    backbone=dict(_delete_=True, type='mmpeft.TimmBackbone', **_base_.photo_backbone),
    decode_head=dict(
        in_channels=_base_.photo_widths,
        num_classes=9,
        loss_decode=dict(class_weight=[0.2] + [1.0] * 8),
    ),
)

dataset = dict(
    data_root='data/photos/ade20k/',
    metainfo=dict(
        classes=('background', *_base_.photo_classes),
        palette=[(90, 90, 90), *_base_.photo_palette],
    ),
)
train_dataloader = dict(dataset=dataset)
val_dataloader = dict(dataset=dataset)
test_dataloader = val_dataloader
