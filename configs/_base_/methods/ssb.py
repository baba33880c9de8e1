# SSB: scales for both channels of a weight (arXiv:2407.05417).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='SSB'))
