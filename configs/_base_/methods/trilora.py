# TriLoRA: an update with a diagonal between two factors (arXiv:2405.11236).
peft = dict(
    type='mmpeft.PEFTHook',
    method=dict(type='TriLoRA', rank=16),
    targets=dict(module='backbone', kinds=('conv', 'linear')),
    unfreeze=(r'^norm[0-3]\.',),  # the fresh norms after each level
)
