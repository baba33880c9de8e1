# MoSLoRA: LoRA with a mixer between its factors (arXiv:2406.11909).
peft = dict(
    type='mmpeft.PEFTHook',
    method=dict(type='MoSLoRA', rank=16),
    targets=dict(module='backbone', kinds=('conv', 'linear')),
    unfreeze=(r'^norm[0-3]\.',),  # the fresh norms after each level
)
