# RepAdapter: a linear bottleneck before a layer, folded into its weight (arXiv:2302.08106).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='RepAdapter'))
