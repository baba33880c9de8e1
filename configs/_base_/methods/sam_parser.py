# SAM-PARSER: the singular values of a weight (arXiv:2308.14604).
peft = dict(
    type='mmpeft.PEFTHook',
    method=dict(type='SAMPARSER'),
    targets=dict(module='backbone', kinds=('conv', 'linear')),
    unfreeze=(r'^norm[0-3]\.',),  # the fresh norms after each level
)
