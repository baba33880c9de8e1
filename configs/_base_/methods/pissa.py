# PiSSA: the principal singular vectors of a weight (arXiv:2404.02948).
peft = dict(
    type='mmpeft.PEFTHook',
    method=dict(type='PiSSA', rank=16),
    targets=dict(module='backbone', kinds=('conv', 'linear')),
    unfreeze=(r'^norm[0-3]\.',),  # the fresh norms after each level
)
