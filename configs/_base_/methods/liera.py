# LieRA: LoRA's update applied multiplicatively (arXiv:2504.00851).
peft = dict(
    type='mmpeft.PEFTHook',
    method=dict(type='LieRA', rank=16),
    targets=dict(module='backbone', kinds=('conv', 'linear')),
    unfreeze=(r'^norm[0-3]\.',),  # the fresh norms after each level
)
