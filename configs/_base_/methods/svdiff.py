# SVDiff: shifts of the singular values (arXiv:2303.11305).
peft = dict(
    type='mmpeft.PEFTHook',
    method=dict(type='SVDiff'),
    targets=dict(module='backbone', kinds=('conv', 'linear')),
    unfreeze=(r'^norm[0-3]\.',),  # the fresh norms after each level
)
