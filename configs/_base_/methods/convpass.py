# Convpass: a convolution in a bottleneck beside attention and MLP (arXiv:2207.07039).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='Convpass'))
