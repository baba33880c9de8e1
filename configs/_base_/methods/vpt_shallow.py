# VPT-shallow: prompts in the first block (arXiv:2203.12119).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='VPT'))
