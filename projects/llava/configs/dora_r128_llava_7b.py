# LLaVA's published script for LoRA, as arXiv:2402.09353 (DoRA) takes it.
_base_ = ['_base_/llava_7b.py', 'mmpeft::_base_/methods/dora.py']
peft = dict(method=dict(rank=128, alpha=256, dropout=0.05))
