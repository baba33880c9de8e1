# Pfeiffer adapters: a bottleneck after each MLP (arXiv:2005.00247).
peft = dict(
    type='mmpeft.PEFTHook',
    method=dict(type='PfeifferAdapter', rank=16),
    targets=dict(module='backbone'),
    unfreeze=(r'^norm[0-3]\.',),  # the fresh norms after each level
)
