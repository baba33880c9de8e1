# IA3: a scale for each output channel of a weight (arXiv:2205.05638).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='IA3'))
