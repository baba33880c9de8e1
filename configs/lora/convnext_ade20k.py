_base_ = [
    '../_base_/models/upernet_convnextv2.py',
    '../_base_/datasets/ade20k_640x640.py',
    '../_base_/schedules/adamw_160k.py',
    '../_base_/runtime_seg.py',
    '../_base_/methods/lora.py',
]
# The papers' parameter counts come from kernels flattened as loralib does it.
default_hooks = dict(peft=dict(_base_.peft, method=dict(_base_.peft.method, layout='loralib')))
