# SSB: scales for both channels of a weight (arXiv:2407.05417).
peft = dict(
    type='mmpeft.PEFTHook',
    method=dict(type='SSB'),
    targets=dict(module='backbone', kinds=('conv', 'linear')),
    unfreeze=(r'^norm[0-3]\.',),  # the fresh norms after each level
)
