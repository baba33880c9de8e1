# BOFT: rotations composed of sparse ones (arXiv:2311.06243).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='BOFT'))
