# AdaptFormer: a bottleneck with biases beside each MLP (arXiv:2205.13535).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='AdaptFormer', rank=64))
