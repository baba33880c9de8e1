# AdaLoRA: ranks that move to where they matter (arXiv:2303.10512).
peft = dict(
    type='mmpeft.PEFTHook',
    method=dict(type='AdaLoRA', rank=16),
    targets=dict(module='backbone', kinds=('conv', 'linear')),
    unfreeze=(r'^norm[0-3]\.',),  # the fresh norms after each level
)
