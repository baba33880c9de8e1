# FLoRA: a Tucker update of every kernel and matrix (arXiv:2405.14739).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='FLoRA', rank=32, kernel_rank=2, scale=4.0))
