# Parallel adapters: a bottleneck beside each layer (arXiv:2110.04366).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='ParallelAdapter', rank=16))
