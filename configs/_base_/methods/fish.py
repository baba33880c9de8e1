# FISH mask: the entries of the largest Fisher information (arXiv:2111.09839).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='FISH'))
