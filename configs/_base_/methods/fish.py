# FISH mask: the entries of the largest Fisher information (arXiv:2111.09839).
peft = dict(
    type='mmpeft.PEFTHook',
    method=dict(type='FISH'),
    targets=dict(module='backbone', kinds=('conv', 'linear')),
    unfreeze=(r'^norm[0-3]\.',),  # the fresh norms after each level
)
