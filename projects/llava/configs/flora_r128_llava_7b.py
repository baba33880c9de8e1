# FLoRA with r1 = r2 of LoRA's rank; its paper prints no hyper-parameters for LLaVA.
_base_ = ['_base_/llava_7b.py', 'mmpeft::_base_/methods/flora.py']
peft = dict(method=dict(rank=128, dropout=0.05))
