# VTAB-1k below data/vtab-1k, a folder a task with the lists train800, val200, train800val200 and
# test, and here CIFAR-100; projects/vtab exchanges the task. As in LieRA, images are not
# normalized and all 1,000 train. As in the works before it, they are resized to 224x224 without
# augmentation, and the test set is used once.
data_root = 'data/vtab-1k/cifar/'
pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(224, 224), interpolation='bicubic', backend='pillow'),
    dict(type='PackInputs'),
]
train_dataloader = dict(
    batch_size=64,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='CustomDataset',
        data_root=data_root,
        ann_file='train800val200.txt',
        pipeline=pipeline,
    ),
)
val_dataloader = dict(
    batch_size=256,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='CustomDataset', data_root=data_root, ann_file='test.txt', pipeline=pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy', topk=(1,))
test_evaluator = val_evaluator
auto_scale_lr = dict(enable=False, base_batch_size=64)
