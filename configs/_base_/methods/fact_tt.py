# FacT-TT: a core for each weight between factors that all weights share (arXiv:2212.03145).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='FacT', rank=16))
