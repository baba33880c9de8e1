# VeRA: two vectors around shared random factors (arXiv:2310.11454).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='VeRA'))
