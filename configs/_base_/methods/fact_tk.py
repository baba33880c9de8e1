# FacT-TK: the same with cores of one shared tensor (arXiv:2212.03145).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='FacT', form='tk', rank=16))
