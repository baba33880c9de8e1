# LoRA with MPC_o: both factors pushed towards orthogonality (arXiv:2407.05417, Eq. 20).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='LoRA', rank=16, mpc='o'))
