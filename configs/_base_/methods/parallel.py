# Parallel adapters: a bottleneck beside each layer (arXiv:2110.04366).
peft = dict(
    type='mmpeft.PEFTHook',
    method=dict(type='ParallelAdapter', rank=16),
    targets=dict(module='backbone'),
    unfreeze=(r'^norm[0-3]\.',),  # the fresh norms after each level
)
