# LoRA with MPC_d: one factor orthogonal, one uncorrelated (arXiv:2407.05417, Eq. 21).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='LoRA', rank=16, mpc='d'))
