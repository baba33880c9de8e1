# Diff pruning: a sparse difference of the weights (arXiv:2012.07463).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='DiffPruning'))
