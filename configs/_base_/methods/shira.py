# SHiRA: a few random entries of each weight, trained directly (arXiv:2406.13175).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='SHiRA'))
