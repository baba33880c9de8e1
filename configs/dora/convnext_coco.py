_base_ = [
    '../_base_/models/mask-rcnn_convnextv2.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/adamw_12e.py',
    '../_base_/runtime_det.py',
    '../_base_/methods/dora.py',
]
# The papers' parameter counts come from kernels flattened as loralib does it.
default_hooks = dict(peft=dict(_base_.peft, method=dict(_base_.peft.method, layout='loralib')))
