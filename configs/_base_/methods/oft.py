# OFT: rotations of blocks of what each output reads (arXiv:2306.07280).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='OFT'))
