# RandLoRA: a full-rank update from random bases and diagonals (arXiv:2502.00987).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='RandLoRA', rank=32))
