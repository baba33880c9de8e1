# TriLoRA: an update with a diagonal between two factors (arXiv:2405.11236).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='TriLoRA', rank=16))
