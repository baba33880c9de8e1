# Rate by the README of the code for arXiv:2402.09353 (DoRA).
_base_ = ['_base_/llama_7b.py', 'mmpeft::_base_/methods/lora.py']
peft = dict(method=dict(rank=16, alpha=32, dropout=0.05))
training = dict(learning_rate=3e-4)
