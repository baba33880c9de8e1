# PiSSA: the principal singular vectors of a weight (arXiv:2404.02948).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='PiSSA', rank=16))
