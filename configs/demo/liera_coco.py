_base_ = ['./_base_/coco.py', '../_base_/methods/liera.py']
default_hooks = dict(peft=_base_.peft)
