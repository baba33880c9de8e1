# SAM-PARSER: the singular values of a weight (arXiv:2308.14604).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='SAMPARSER'))
