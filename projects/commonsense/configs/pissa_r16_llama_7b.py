# Rate and alpha = rank by the training script of arXiv:2406.09044 (MiLoRA).
_base_ = ['_base_/llama_7b.py', 'mmpeft::_base_/methods/pissa.py']
peft = dict(method=dict(rank=16, alpha=16, dropout=0.05))
training = dict(learning_rate=3e-4)
