# MoSLoRA: LoRA with a mixer between its factors (arXiv:2406.11909).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='MoSLoRA', rank=16))
