# The lower end: a frozen backbone.
peft = dict(
    type='mmpeft.PEFTHook',
    method=dict(type='Frozen'),
    targets=dict(module='backbone'),
    unfreeze=(r'^norm[0-3]\.',),  # the fresh norms after each level
)
