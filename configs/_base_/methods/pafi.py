# PaFi: the entries of the smallest magnitude (arXiv:2305.16742).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='PaFi'))
