# SSL: a scale for each input channel of a weight (arXiv:2407.05417).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='SSL'))
