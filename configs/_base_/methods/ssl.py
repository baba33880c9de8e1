# SSL: a scale for each input channel of a weight (arXiv:2407.05417).
peft = dict(
    type='mmpeft.PEFTHook',
    method=dict(type='SSL'),
    targets=dict(module='backbone', kinds=('conv', 'linear')),
    unfreeze=(r'^norm[0-3]\.',),  # the fresh norms after each level
)
