# PaFi: the entries of the smallest magnitude (arXiv:2305.16742).
peft = dict(
    type='mmpeft.PEFTHook',
    method=dict(type='PaFi'),
    targets=dict(module='backbone', kinds=('conv', 'linear')),
    unfreeze=(r'^norm[0-3]\.',),  # the fresh norms after each level
)
