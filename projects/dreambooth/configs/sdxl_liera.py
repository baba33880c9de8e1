# LieRA, Fig. 2, right. Its tables count kernels as loralib flattens them.
_base_ = ['_base_/sdxl.py', '../../../configs/_base_/methods/liera.py']
default_hooks = dict(peft=dict(method=dict(_base_.peft.method, layout='loralib')))
