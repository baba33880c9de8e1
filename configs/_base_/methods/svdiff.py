# SVDiff: shifts of the singular values (arXiv:2303.11305).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='SVDiff'))
