# 100 epochs of AdamW at 1e-3 with weight decay 0.05 (as in LieRA's Table 8, for COCO), a warm-up of
# 10 epochs and a cosine. LieRA gives no rate and no epochs for VTAB-1k: these are of the works
# whose protocol it follows. The last epoch alone is evaluated.
_base_ = 'adamw_12e.py'

max_epochs = 100
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, end=10, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', begin=10, end=max_epochs, convert_to_iter_based=True),
]
