# Scaled parallel adapters: a scaled bottleneck beside each MLP (arXiv:2110.04366).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='ScaledParallelAdapter', rank=16))
