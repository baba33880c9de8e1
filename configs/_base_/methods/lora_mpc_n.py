# LoRA with MPC_n: a non-linearity between the factors, the parallel adapter (arXiv:2407.05417).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='ParallelAdapter', rank=16))
