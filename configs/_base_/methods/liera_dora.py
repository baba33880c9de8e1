# LieRA on DoRA: its update multiplies the weight (arXiv:2504.00851).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='DoRA', rank=16, update='lie'))
