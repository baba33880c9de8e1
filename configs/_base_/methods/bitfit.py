# BitFit: only the biases (arXiv:2106.10199).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='BitFit'))
