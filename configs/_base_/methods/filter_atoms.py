# Filter atoms: one map of a kernel's positions for a layer (arXiv:2403.00269).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='FilterAtoms'))
