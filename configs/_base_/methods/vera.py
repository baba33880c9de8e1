# VeRA: two vectors around shared random factors (arXiv:2310.11454).
peft = dict(
    type='mmpeft.PEFTHook',
    method=dict(type='VeRA'),
    targets=dict(module='backbone', kinds=('conv', 'linear')),
    unfreeze=(r'^norm[0-3]\.',),  # the fresh norms after each level
)
