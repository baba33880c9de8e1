# A linear classifier on the demo's small ConvNeXt-V2, of single digits on 40x40 pixels.
_base_ = [
    '../../_base_/models/classifier_convnextv2.py',
    '../../_base_/runtime_cls.py',
    './schedule.py',
]

model = dict(
    backbone=_base_.backbone,
    head=dict(in_channels=_base_.backbone_widths[-1], num_classes=10),
)

dataset = dict(
    type='CustomDataset',
    data_root='data/digits/classification/',
    metainfo=dict(classes=_base_.digits),
    pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')],
)
train_dataloader = dict(batch_size=32, dataset=dict(ann_file='train.txt', **dataset))
val_dataloader = dict(dataset=dict(ann_file='val.txt', **dataset))
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy', topk=(1,))
test_evaluator = val_evaluator

default_hooks = _base_.demo_hooks
log_processor = dict(by_epoch=False)
