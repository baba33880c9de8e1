# Mona: depthwise filters of three sizes after each residual addition (arXiv:2408.08345).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='Mona', rank=64))
