_base_ = ['./_base_/ade20k.py', '../_base_/methods/frozen.py']
default_hooks = dict(peft=_base_.peft)
