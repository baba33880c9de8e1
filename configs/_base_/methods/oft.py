# OFT: rotations within blocks of input channels (arXiv:2306.07280).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='OFT'))
