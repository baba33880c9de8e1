"""Frozen layers between the adapted ones: they need no gradient of their own."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from mmpeft.methods.adapter import SHARDED
from mmpeft.quantization import Quantized
from mmpeft.transforms import is_transformed

from .classes import Fast, forward_owner
from .cpu import onednn
from .function import FastFunction
from .matmul import linear
from .recompute import accept_product, offer_product, tag_for_recompute, through
from .response_norm import response_norm


class FrozenLinear(Fast):
    """A linear layer without adapter."""

    def forward(self, input):
        if not _is_passed_through(self, input) or isinstance(self.weight, Quantized):
            return super().forward(input)
        autocast = torch.is_autocast_enabled(input.device.type)
        if autocast or not onednn.pays(input, self.weight):
            y = super().forward(input)
        else:
            y = onednn.FrozenLinear.apply(input, self.weight, self.bias)
        if self.out_features > self.in_features and not _is_away_later(self):
            offer_product(y, partial(_linear, y.dtype), input, self.weight, self.bias)
        return y


class FrozenResponseNorm(Fast):
    """timm's global response normalization."""

    def forward(self, x):
        if x.ndim != 4 or _is_away_later(self) or not _is_passed_through(self, x):
            return super().forward(x)
        return response_norm(x, self.weight, self.bias, self.eps, self.channel_dim)


class FrozenBatchNorm(Fast):
    """A batch norm in evaluation mode."""

    def forward(self, input):
        if self.training or self.running_var is None or not _is_passed_through(self, input):
            return super().forward(input)
        return ChannelAffine.apply(input, super().forward, self.weight, self.running_var, self.eps)


class ChannelAffine(Function):
    """A norm by running statistics is affine by channel: backward needs no map.

    Shapes: ``x`` (N, C, *size) and the same for the result; ``weight`` (C,) or None, and
    ``variance`` (C,), both frozen. ``norm`` is the function itself.
    """

    @staticmethod
    def forward(ctx, x, norm, weight, variance, eps):
        ctx.save_for_backward(weight, variance)
        ctx.eps = eps
        return norm(x)

    @staticmethod
    def backward(ctx, dy):
        weight, variance = ctx.saved_tensors
        dx = F.batch_norm(dy, torch.zeros_like(variance), variance, weight, eps=ctx.eps)
        return dx, None, None, None, None


class Recomputable(Fast):
    """A norm or an activation whose output costs little to compute again."""

    def forward(self, input):
        y = super().forward(input)
        if y is input or _is_away_later(self) or not _is_passed_through(self, input):
            return y
        if torch.promote_types(input.dtype, y.dtype) != y.dtype:
            return y
        return tag_for_recompute(y, partial(_again, super().forward, y.dtype), input)


class Activation(Recomputable):
    """One whose own input costs a product, which backward may do again.

    A subclass returns its function and the function's gradient in :meth:`functions`.
    """

    repeats_products = False

    def forward(self, input):
        repeats = self.repeats_products and _is_passed_through(self, input)
        if not repeats or getattr(self, 'inplace', False) or not accept_product(input):
            return super().forward(input)
        function, gradient = self.functions()
        y = Pointwise(function, gradient)(input)
        again, kept = through(function, input)
        return tag_for_recompute(y, again, *kept)


class FrozenGELU(Activation):
    """GELU."""

    def functions(self):
        how = dict(approximate=getattr(self, 'approximate', 'none'))
        return partial(F.gelu, **how), partial(torch.ops.aten.gelu_backward, **how)


class FrozenSiLU(Activation):
    """SiLU."""

    def functions(self):
        return F.silu, torch.ops.aten.silu_backward


@dataclass(eq=False)
class Pointwise(FastFunction):
    """y = f(x), by element; ``gradient`` is of dy and x."""

    recomputes_input: ClassVar = True
    function: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]

    def forward(self, save, x):
        return self.function(x)

    def gradients(self, needs, dy, x):
        return (self.gradient(dy, x),)

    def reference(self, x):
        return self.function(x)


def _is_away_later(layer):
    """Whether backward may find a layer's parameters sharded when a later layer needs them."""
    return SHARDED in layer.__dict__ and bool(layer._parameters)


def _linear(dtype, x, weight, bias):
    bias = None if bias is None else bias.to(dtype)
    return linear(x.to(dtype), weight.to(dtype), bias)


def _again(forward, dtype, x):
    return forward(x.to(dtype))


KINDS = {
    'torch.nn.modules.linear.Linear': FrozenLinear,
    'timm.layers.grn.GlobalResponseNorm': FrozenResponseNorm,
    'torch.nn.modules.batchnorm._BatchNorm': FrozenBatchNorm,
    'torch.nn.modules.batchnorm.SyncBatchNorm': FrozenBatchNorm,
    'torch.nn.modules.normalization.LayerNorm': Recomputable,
    'torch.nn.modules.normalization.RMSNorm': Recomputable,
    'torch.nn.modules.activation.GELU': FrozenGELU,
    'torch.nn.modules.activation.SiLU': FrozenSiLU,
    'timm.layers.norm.LayerNorm': Recomputable,
    'timm.layers.norm.LayerNorm2d': Recomputable,
    'timm.layers.norm.RmsNorm': Recomputable,
    'timm.layers.activations.GELU': FrozenGELU,
}


def kind_for(layer: nn.Module) -> type | None:
    """Which of the classes above fits a layer, by the class that defines its ``forward``."""
    owner = forward_owner(type(layer))
    return KINDS.get(f'{owner.__module__}.{owner.__qualname__}')


def _is_passed_through(layer, x):
    """Whether a gradient flows through a layer to its input, and none to its parameters."""
    if is_transformed() or x.is_nested or not (torch.is_grad_enabled() and x.requires_grad):
        return False
    own = layer._parameters.values()
    return 'parametrizations' not in layer._modules and not any(
        p is not None and p.requires_grad for p in own
    )
