# Diff pruning: a sparse difference of the weights (arXiv:2012.07463).
peft = dict(
    type='mmpeft.PEFTHook',
    method=dict(type='DiffPruning'),
    targets=dict(module='backbone', kinds=('conv', 'linear')),
    unfreeze=(r'^norm[0-3]\.',),  # the fresh norms after each level
)
