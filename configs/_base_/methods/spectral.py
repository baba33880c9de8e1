# Spectral adapter: shifts of the top singular vectors (arXiv:2405.13952).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='SpectralAdapter', rank=16))
