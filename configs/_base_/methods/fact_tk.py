# FacT-TK: as FacT-TT, with each core built from one shared tensor (arXiv:2212.03145).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='FacT', form='tk', rank=16))
