_base_ = './default_runtime.py'

default_scope = 'mmrotate'
default_hooks = dict(
    checkpoint=dict(save_best='dota/mAP'),
    visualization=dict(type='mmdet.DetVisualizationHook'),
)
visualizer = dict(
    type='mmrotate.RotLocalVisualizer', vis_backends=_base_.vis_backends, name='visualizer'
)
log_processor = dict(type='LogProcessor', window_size=50, by_epoch=True)
