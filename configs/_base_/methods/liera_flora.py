# LieRA on FLoRA: its update multiplies the weight (arXiv:2504.00851).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='FLoRA', rank=16, update='lie'))
