# What the tasks of the demo share: the bases, the classes, the loaders and the schedule.
backbone = dict(
    name='convnextv2_atto',
    depths=(1, 1, 4, 1),
    pretrained=False,
    checkpoint='work_dirs/demo/base.pth',
    drop_path=0.0,
)
backbone_widths = [40, 80, 160, 320]

digits = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')
digit_palette = [
    (230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200), (245, 130, 48),
    (145, 30, 180), (70, 240, 240), (240, 50, 230), (210, 245, 60), (0, 128, 128),
]  # fmt: skip

# Of `make demo DATA=photos`, in place of the above (see the folder photos).
photo_backbone = dict(
    name='tf_efficientnet_lite0',
    checkpoint='work_dirs/demo/efficientnet_lite0.pth',
    out_indices=(1, 2, 3, 4),
)
photo_widths = [24, 40, 112, 320]
photo_mean, photo_std = [127.0] * 3, [128.0] * 3
photo_classes = ('mammal', 'bird', 'fish', 'flower', 'fruit', 'vegetable', 'tool', 'instrument')
photo_palette = digit_palette[:8]

train_dataloader = dict(batch_size=8, num_workers=0, sampler=dict(type='InfiniteSampler'))
val_dataloader = dict(
    batch_size=8, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False)
)
test_dataloader = val_dataloader

max_iters = 600
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=max_iters)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0, norm_type=2),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=50, end=max_iters, eta_min=1e-5),
]
demo_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(by_epoch=False, interval=100, max_keep_ckpts=2, save_best=None),
)
randomness = dict(seed=0)
