"""Frozen layers between the adapted ones: they need no gradient of their own."""

from functools import partial

import torch
from torch import nn
from torch.nn.utils import parametrize

from .linear import Frozen
from .recompute import Recipe, remember
from .response_norm import response_norm


class FrozenLinear:
    """A linear layer without adapter."""

    def forward(self, x):
        if not _is_passed_through(self, x) or torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        return Frozen.apply(x, self.weight, self.bias)


class FrozenResponseNorm:
    """timm's global response normalization."""

    def forward(self, x):
        if not _is_passed_through(self, x) or x.ndim != 4:
            return super().forward(x)
        return response_norm(x, self.weight, self.bias, self.eps, self.channel_dim)


class Repeatable:
    """A norm or an activation whose output costs little to compute again."""

    def forward(self, x):
        y = super().forward(x)
        if y is x or not _is_passed_through(self, x):
            return y
        if torch.promote_types(x.dtype, y.dtype) != y.dtype:
            return y
        again = partial(_again, super().forward, y.dtype)
        return remember(y, Recipe(again, (x,)))


def _again(forward, dtype, x):
    return forward(x.to(dtype))


KINDS = {
    'torch.nn.modules.linear.Linear': FrozenLinear,
    'timm.layers.grn.GlobalResponseNorm': FrozenResponseNorm,
    'torch.nn.modules.normalization.LayerNorm': Repeatable,
    'torch.nn.modules.normalization.RMSNorm': Repeatable,
    'torch.nn.modules.activation.GELU': Repeatable,
    'torch.nn.modules.activation.SiLU': Repeatable,
    'timm.layers.norm.LayerNorm': Repeatable,
    'timm.layers.norm.LayerNorm2d': Repeatable,
    'timm.layers.norm.RmsNorm': Repeatable,
    'timm.layers.activations.GELU': Repeatable,
}


def kind_for(layer: nn.Module) -> type | None:
    """Which of the classes above a layer may take; None if none.

    What counts is whose ``forward`` it runs; a subclass with its own is left
    alone.
    """
    owner = next(c for c in type(layer).__mro__ if 'forward' in vars(c))
    return KINDS.get(f'{owner.__module__}.{owner.__qualname__}')


def _is_passed_through(layer, x):
    """Whether gradients flow through a layer, and none to anything in it."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return False
    own = layer.parameters(recurse=False)
    return not parametrize.is_parametrized(layer) and not any(p.requires_grad for p in own)
