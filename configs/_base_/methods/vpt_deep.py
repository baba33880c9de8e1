# VPT-deep: prompts in every block (arXiv:2203.12119).
peft = dict(
    type='mmpeft.PEFTHook',
    method=dict(type='VPT', deep=True),
    targets=dict(module='backbone'),
    unfreeze=(r'^norm[0-3]\.',),  # the fresh norms after each level
)
