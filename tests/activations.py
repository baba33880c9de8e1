"""Small adapted networks, and what the tests of methods on activations read of them."""

import copy
import math

import numpy as np
import timm
from torch import nn

import mmpeft
from tests.cases import BLOCKS, randomize

ACTIVATIONS = dict(
    gelu=lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
    relu=lambda x: np.maximum(x, 0),
    swish=lambda x: x / (1 + np.exp(-x)),
    identity=lambda x: x,
)


def close(a, b):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-12, atol=1e-12)


def adapted(name, method, **targets):
    """A small network, the same adapted and moved off its start, and an input."""
    plain = BLOCKS[name].build().requires_grad_(False)
    model = copy.deepcopy(plain).requires_grad_(True)
    mmpeft.inject(model, method, targets)
    randomize(model)
    return plain, model, BLOCKS[name].input()


def recorded(module):
    """A list that receives the input and output of each call of a module."""
    calls = []

    def hook(_, args, output):
        y = output[0] if isinstance(output, tuple) else output
        calls.append((args[0].detach().clone(), y.detach().clone()))

    module.register_forward_hook(hook)
    return calls


def channels_last(x, axis):
    return np.moveaxis(x.detach().numpy(), axis, -1)


def factors_of(site):
    return {k: v.detach().numpy() for k, v in site.adapter.factors.items()}


def hooks(model):
    """Modules of a model with hooks around their forward."""
    return [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def plain_and_adapted(model, **method):
    """A network in float64, and the same adapted and moved off its start."""
    plain = model.double().eval()
    model = copy.deepcopy(plain)
    mmpeft.inject(model, method)
    randomize(model)
    return plain, model


def vit(**settings):
    """With a class token, on 2x3 patches."""
    sizes = dict(img_size=(32, 48), patch_size=16, embed_dim=8, depth=1, num_heads=2)
    return timm.create_model('vit_tiny_patch16_224', **sizes, num_classes=0)


def loaded(module, **values):
    """A module of torch with given parameters."""
    for name, value in values.items():
        getattr(module, name).data = value.data.view_as(getattr(module, name))
    return module.double()


def bottleneck(f, width, rank):
    down = loaded(nn.Linear(width, rank), weight=f['down'], bias=f['down_bias'])
    return down, loaded(nn.Linear(rank, width), weight=f['up'], bias=f['up_bias'])
