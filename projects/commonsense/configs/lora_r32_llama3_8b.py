# Rate by the README of the code for arXiv:2402.09353 (DoRA).
_base_ = ['_base_/llama3_8b.py', 'mmpeft::_base_/methods/lora.py']
peft = dict(method=dict(rank=32, alpha=64, dropout=0.05))
training = dict(learning_rate=3e-4)
