# VPT-shallow: prompts in the first block (arXiv:2203.12119).
peft = dict(
    type='mmpeft.PEFTHook',
    method=dict(type='VPT'),
    targets=dict(module='backbone'),
    unfreeze=(r'^norm[0-3]\.',),  # the fresh norms after each level
)
