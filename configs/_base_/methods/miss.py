# MiSS: one shard of columns, repeated over the weight (arXiv:2409.15371).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='MiSS', rank=16))
