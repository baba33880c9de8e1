# DoRA: LoRA on the direction of a weight, its magnitude apart (arXiv:2402.09353).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='DoRA', rank=16))
