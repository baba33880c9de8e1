# AdaLoRA: ranks that move to where they matter (arXiv:2303.10512).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='AdaLoRA', rank=16))
