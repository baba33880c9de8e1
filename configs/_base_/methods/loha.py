# LoHa: the elementwise product of two low-rank updates (arXiv:2108.06098).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='LoHa', rank=16))
