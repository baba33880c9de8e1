# Houlsby adapters: a bottleneck after each branch (arXiv:1902.00751).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='HoulsbyAdapter', rank=16))
