# The lower end: a frozen backbone.
peft = dict(type='mmpeft.PEFTHook', method=dict(type='Frozen'))
