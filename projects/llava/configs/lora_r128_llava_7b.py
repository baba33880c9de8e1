# LLaVA's published script for LoRA.
_base_ = ['_base_/llava_7b.py', 'mmpeft::_base_/methods/lora.py']
peft = dict(method=dict(rank=128, alpha=256, dropout=0.05))
