_base_ = './default_runtime.py'

default_scope = 'mmpretrain'
# No best checkpoint is kept: it would be the best on the test set of VTAB-1k.
default_hooks = dict(
    checkpoint=dict(interval=10, max_keep_ckpts=1),
    visualization=dict(type='mmpretrain.VisualizationHook', enable=False),
)
visualizer = dict(
    type='mmpretrain.UniversalVisualizer', vis_backends=_base_.vis_backends, name='visualizer'
)
log_processor = dict(type='LogProcessor', window_size=50, by_epoch=True)
