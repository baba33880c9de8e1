# Pfeiffer adapters: a bottleneck after each MLP (arXiv:2005.00247).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='PfeifferAdapter', rank=16))
