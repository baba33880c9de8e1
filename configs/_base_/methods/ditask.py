# DiTASK: singular values, resampled by a diffeomorphism (arXiv:2502.06029).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='DiTASK'))
