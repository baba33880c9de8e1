# MiLoRA: the minor singular vectors of a weight (arXiv:2406.09044).
peft = dict(
    type='mmpeft.PEFTHook',
    method=dict(type='MiLoRA', rank=16),
    targets=dict(module='backbone', kinds=('conv', 'linear')),
    unfreeze=(r'^norm[0-3]\.',),  # the fresh norms after each level
)
