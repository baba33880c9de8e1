# DoRA: LoRA on the direction of a weight, its magnitude apart (arXiv:2402.09353).
peft = dict(
    type='mmpeft.PEFTHook',
    method=dict(type='DoRA', rank=16),
    targets=dict(module='backbone', kinds=('conv', 'linear')),
    unfreeze=(r'^norm[0-3]\.',),  # the fresh norms after each level
)
