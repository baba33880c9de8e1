# The lower baseline: a frozen backbone.
peft = dict(type='mmpeft.PEFTHook', method=dict(type='Frozen'))
