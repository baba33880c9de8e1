# 100 epochs of AdamW at 1e-3 with weight decay 0.05 (LieRA, Table 8), a warm-up of 10 epochs and a
# cosine. LieRA gives no rate and no epochs for VTAB-1k: these are those of the works whose protocol
# it follows. Norms and biases do not decay; the last epoch alone is evaluated.
max_epochs = 100
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=max_epochs)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        bypass_duplicate=True,  # factors that adapters hold in common
        custom_keys=dict(grn=dict(decay_mult=0.0)),
    ),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, end=10, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', begin=10, end=max_epochs, convert_to_iter_based=True),
]
