# BitFit: the biases alone (arXiv:2106.10199).
peft = dict(
    type='mmpeft.PEFTHook',
    method=dict(type='BitFit'),
    targets=dict(module='backbone', exclude=(r'^norm[0-3]\.',)),
    unfreeze=(r'^norm[0-3]\.',),  # the fresh norms after each level, trained themselves
)
