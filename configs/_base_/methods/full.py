# The upper baseline: the whole backbone trains.
peft = dict(type='mmpeft.PEFTHook', method=dict(type='Full'))
