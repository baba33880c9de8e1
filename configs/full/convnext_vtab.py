_base_ = [
    '../_base_/models/classifier_convnextv2.py',
    '../_base_/datasets/vtab.py',
    '../_base_/schedules/adamw_100e.py',
    '../_base_/runtime_cls.py',
    '../_base_/methods/full.py',
]
# LieRA's protocol: images are not normalised, only divided by 255.
model = dict(data_preprocessor=dict(mean=[0.0] * 3, std=[255.0] * 3), head=dict(num_classes=100))
optim_wrapper = dict(optimizer=dict(lr=1e-4))
default_hooks = dict(peft=_base_.peft)
