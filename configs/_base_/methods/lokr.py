# LoKr: a Kronecker product with a low-rank block (arXiv:2309.14859).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='LoKr', rank=16))
