# LieRA, Table 9.
_base_ = ['_base_/llama3_8b.py', 'mmpeft::_base_/methods/liera.py']
peft = dict(method=dict(rank=32, alpha=64, dropout=0.05))
training = dict(learning_rate=1e-3)
