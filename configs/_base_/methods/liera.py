# LieRA: LoRA's update applied multiplicatively (arXiv:2504.00851).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='LieRA', rank=16))
