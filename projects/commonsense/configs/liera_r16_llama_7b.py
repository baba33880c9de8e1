# LieRA, Table 9.
_base_ = ['_base_/llama_7b.py', 'mmpeft::_base_/methods/liera.py']
peft = dict(method=dict(rank=16, alpha=32, dropout=0.05))
training = dict(learning_rate=2e-3)
