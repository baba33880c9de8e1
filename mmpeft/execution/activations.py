"""Frozen norms and activations whose output costs little to compute again."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from mmpeft.methods.adapter import SHARDED
from mmpeft.transforms import is_transformed

from .classes import Fast
from .function import FastFunction
from .recompute import accept_product, tag_for_recompute, through


class Recomputable(Fast):
    """A norm or an activation, of which layers behind it save the input."""

    def forward(self, input):
        y = super().forward(input)
        if y is input or is_away_later(self) or not is_passed_through(self, input):
            return y
        if torch.promote_types(input.dtype, y.dtype) != y.dtype:
            return y
        return tag_for_recompute(y, partial(_again, super().forward, y.dtype), input)


class Activation(Recomputable):
    """One whose input backward needs.

    That costs a product, which backward may do again. An activation in place keeps a copy of it. A
    subclass returns its function and the function's gradient in :meth:`functions`.
    """

    repeats_products = False
    is_one_operation = True  # of torch, which keeps the input alone

    def forward(self, input):
        if not is_passed_through(self, input):
            return super().forward(input)
        if getattr(self, 'inplace', False):
            is_plain = not (input.is_leaf or input._is_view())
            return self._in_place(input) if is_plain else super().forward(input)
        repeats = self.repeats_products and accept_product(input)
        if self.is_one_operation and not repeats:
            return super().forward(input)
        function, gradient = self.functions()
        y = Pointwise(function, gradient)(input)
        again, kept = through(function, input)
        return tag_for_recompute(y, again, *kept)

    def _in_place(self, input):
        function, gradient = self.functions()
        kept = input.clone()
        y = InPlace.apply(input, kept, function, gradient)
        return tag_for_recompute(y, function, kept)


class FrozenGELU(Activation):
    """GELU."""

    def functions(self):
        how = dict(approximate=getattr(self, 'approximate', 'none'))
        return partial(F.gelu, **how), partial(torch.ops.aten.gelu_backward, **how)


class FrozenSiLU(Activation):
    """SiLU."""

    def functions(self):
        return F.silu, torch.ops.aten.silu_backward


class FrozenSwish(FrozenSiLU):
    """mmcv's, which multiplies by a sigmoid."""

    is_one_operation = False


class FrozenHardswish(Activation):
    """Hardswish."""

    def functions(self):
        return F.hardswish, torch.ops.aten.hardswish_backward


class FrozenHardtanh(Activation):
    """Hardtanh and ReLU6."""

    def functions(self):
        how = dict(min_val=self.min_val, max_val=self.max_val)
        return partial(F.hardtanh, **how), partial(torch.ops.aten.hardtanh_backward, **how)


class FrozenMish(Activation):
    """Mish."""

    def functions(self):
        return F.mish, torch.ops.aten.mish_backward


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


class InPlace(Function):
    """y = f(x) in the memory of x, by element, where ``kept`` is a copy of x.

    torch's activations in place keep such a copy too, but out of reach.
    """

    @staticmethod
    def forward(ctx, x, kept, function, gradient):
        ctx.function, ctx.gradient = function, gradient
        ctx.save_for_backward(kept)
        ctx.mark_dirty(x)
        return function(x, inplace=True)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return None, ctx.gradient(dy, x), None, None
        x = x.view_as(x)
        (dx,) = torch.autograd.grad(ctx.function(x), x, dy, create_graph=True)
        return None, dx, None, None


def is_passed_through(layer: nn.Module, x: Tensor) -> bool:
    """Whether a gradient flows through a layer to its input, and none to its parameters."""
    if is_transformed() or x.is_nested or not (torch.is_grad_enabled() and x.requires_grad):
        return False
    own = layer._parameters.values()
    return 'parametrizations' not in layer._modules and not any(
        p is not None and p.requires_grad for p in own
    )


def is_away_later(layer: nn.Module) -> bool:
    """Whether backward may find a layer's parameters sharded when a later layer needs them."""
    return SHARDED in layer.__dict__ and bool(layer._parameters)


def _again(forward, dtype, x):
    return forward(x.to(dtype))
