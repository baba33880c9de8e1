# FLoRA: a Tucker update of every kernel and matrix (arXiv:2405.14739).
peft = dict(
    type='mmpeft.PEFTHook',
    method=dict(type='FLoRA', rank=32, kernel_rank=2, scale=4.0),
    targets=dict(module='backbone', kinds=('conv', 'linear')),
    unfreeze=(r'^norm[0-3]\.',),  # the fresh norms after each level
)
