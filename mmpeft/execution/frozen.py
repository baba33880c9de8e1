"""Frozen layers between the adapted ones: they need no gradient of their own."""

from functools import partial

import torch
from torch import nn
from torch.nn.utils import parametrize

from mmpeft.methods.adapter import SHARDED
from mmpeft.quantization import Quantized
from mmpeft.transforms import is_transformed

from .classes import Fast
from .cpu import onednn
from .recompute import tag_for_recompute
from .response_norm import response_norm


class FrozenLinear(Fast):
    """A linear layer without adapter."""

    def forward(self, x):
        other = torch.is_autocast_enabled(x.device.type) or isinstance(self.weight, Quantized)
        if other or not _is_passed_through(self, x) or not onednn.pays(x, self.weight):
            return super().forward(x)
        return onednn.FrozenLinear.apply(x, self.weight, self.bias)


class FrozenResponseNorm(Fast):
    """timm's global response normalization."""

    def forward(self, x):
        if x.ndim != 4 or _is_away_later(self) or not _is_passed_through(self, x):
            return super().forward(x)
        return response_norm(x, self.weight, self.bias, self.eps, self.channel_dim)


class Recomputable(Fast):
    """A norm or an activation whose output costs little to compute again."""

    def forward(self, x):
        y = super().forward(x)
        if y is x or _is_away_later(self) or not _is_passed_through(self, x):
            return y
        if torch.promote_types(x.dtype, y.dtype) != y.dtype:
            return y
        return tag_for_recompute(y, partial(_again, super().forward, y.dtype), x)


def _is_away_later(layer):
    """Whether backward may find a layer's parameters sharded when a later layer needs them."""
    return SHARDED in layer.__dict__ and bool(layer._parameters)


def _again(forward, dtype, x):
    return forward(x.to(dtype))


KINDS = {
    'torch.nn.modules.linear.Linear': FrozenLinear,
    'timm.layers.grn.GlobalResponseNorm': FrozenResponseNorm,
    'torch.nn.modules.normalization.LayerNorm': Recomputable,
    'torch.nn.modules.normalization.RMSNorm': Recomputable,
    'torch.nn.modules.activation.GELU': Recomputable,
    'torch.nn.modules.activation.SiLU': Recomputable,
    'timm.layers.norm.LayerNorm': Recomputable,
    'timm.layers.norm.LayerNorm2d': Recomputable,
    'timm.layers.norm.RmsNorm': Recomputable,
    'timm.layers.activations.GELU': Recomputable,
}


def kind_for(layer: nn.Module) -> type | None:
    """Which of the classes above fits a layer, by the class that defines its ``forward``."""
    owner = next(c for c in type(layer).__mro__ if 'forward' in vars(c))
    return KINDS.get(f'{owner.__module__}.{owner.__qualname__}')


def _is_passed_through(layer, x):
    """Whether a gradient flows through a layer to its input, and none to its parameters."""
    if is_transformed() or not (torch.is_grad_enabled() and x.requires_grad):
        return False
    own = layer.parameters(recurse=False)
    return not parametrize.is_parametrized(layer) and not any(p.requires_grad for p in own)
