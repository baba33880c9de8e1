# LoRA: the product of two thin matrices (arXiv:2106.09685).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='LoRA', rank=16))
