# LoTR: factors that all weights of one shape share (arXiv:2402.01376).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='LoTR', rank=16))
