# FLoRA on Stable Diffusion, which its paper names without settings; those are LieRA's.
_base_ = ['_base_/sd15.py', '../../../configs/_base_/methods/flora.py']
default_hooks = dict(peft=dict(method=_base_.peft.method))
