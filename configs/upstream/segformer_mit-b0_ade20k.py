# SegFormer with MiT-B0, LoRA in attention and MLPs: linear layers and 1x1 convolutions.
_base_ = [
    'mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py',
    '../_base_/methods/lora.py',
]

default_hooks = dict(peft=dict(_base_.peft, targets=dict(kinds=('linear', 'pointwise'))))
