# LoRA, kernels flattened as loralib does (arXiv:2106.09685).
peft = dict(
    type='mmpeft.PEFTHook',
    method=dict(type='LoRA', rank=16),
    targets=dict(module='backbone', kinds=('conv', 'linear')),
    unfreeze=(r'^norm[0-3]\.',),  # the fresh norms after each level
)
