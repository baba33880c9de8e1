# SSF: a scale and a shift of each layer's output (arXiv:2210.08823).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='SSF'))
