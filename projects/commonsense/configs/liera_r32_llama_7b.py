# LieRA, Table 9, at twice its rank.
_base_ = ['_base_/llama_7b.py', 'mmpeft::_base_/methods/liera.py']
peft = dict(method=dict(rank=32, alpha=64, dropout=0.05))
training = dict(learning_rate=2e-3)
