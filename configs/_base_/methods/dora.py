# DoRA: LoRA on the direction of a weight, with a separate magnitude (arXiv:2402.09353).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='DoRA', rank=16))
