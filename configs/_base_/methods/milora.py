# MiLoRA: the minor singular vectors of a weight (arXiv:2406.09044).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='MiLoRA', rank=16))
