"""Products with an adapted matrix W' that do not keep it.

Autograd forms W' = W + s U G V in forward, keeps it, and in backward forms the
dense gradient dy^T x (O, I) only to multiply it with V and U G. Here W' is built
again in backward, and where the rank is small enough the gradients of the factors
come from products with x V^T and dy U G, r wide.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mmpeft.methods.normal_form import NormalForm
from mmpeft.quantization import dequantized

from .cpu import scratch
from .function import FastFunction
from .matmul import (
    ChannelsLast,
    Layout,
    is_low,
    matmul_add,
    product,
    takes_float,
    times,
    times_,
)
from .recompute import cast


@dataclass(eq=False)
class AdaptedLinear(FastFunction):
    """y = x W'^T + b, W' = W + s U G V, W * (1 + s U G V) or W * exp(s U G V), its rows scaled.

    Shapes: ``x`` a map of I channels; ``weight`` W (O, I), frozen; ``bias`` b (O,) or None;
    ``up`` U (O, a); ``core`` G (a, r), or None for the identity; ``down`` V (r, I); ``ratio``
    (O,), which multiplies the rows of an additive W', or None. y is a map of O channels, and each
    gradient has its argument's shape.

    Attributes:
        layout: Of the maps.
        update: Of :data:`mmpeft.methods.updates.UPDATES`.
        scale: s
        branch: Compute an additive update without ratio beside the product instead of in W. In
            low precision W' itself would round a small update away; where it is built all the same
            its difference from W has a product of its own, or one in float32 has both.
    """

    recomputes_input: ClassVar = True
    layout: Layout
    update: str
    scale: float
    branch: bool

    def forward(self, save, x, weight, bias, up, core, down, ratio):
        layout, weight = self.layout, dequantized(weight)
        if self.branch:
            above, below = factors = self._narrow_factors(up, core, down, x.dtype)
            narrow = layout.matmul(x, above)
            save(narrow, *(factors if is_low(x) else ()))
            return matmul_add(layout, x, weight, narrow, below, bias)
        save()
        up = _composed(up, core)
        if is_low(x) and not takes_float(x):
            y = layout.matmul(x, cast(self._change(weight, up, down, ratio), x.dtype), bias)
            return layout.accumulate(y, x, weight)
        adapted = self._adapted(weight, up, down, ratio)
        bias = None if bias is None else cast(bias, adapted.dtype)
        return cast(layout.matmul(cast(x, adapted.dtype), adapted, bias), x.dtype)

    def saves_output(self, x, weight, bias, up, core, down, ratio):
        return ratio is not None

    def gradients(self, needs, dy, x, weight, bias, first, core, down, ratio, *saved):
        layout, scale, dtype, dy = self.layout, self.scale, first.dtype, dy.contiguous()
        need_x, _, need_bias, need_first, need_core, need_down, need_ratio = needs
        need_up, (out, features) = need_first or need_core or need_ratio, weight.shape
        sizes = dy.numel() // out, out, features, down.shape[0], need_up + need_down
        thin = self.update == 'additive' and thin_pays(*sizes)
        if need_x or need_ratio or not thin:
            weight = dequantized(weight)
        dx = d_bias = d_up = d_down = d_ratio = adapted = y = narrow = None
        if self.branch:
            narrow, *factors = saved
            above, below = factors or self._narrow_factors(first, core, down, dy.dtype)
            inner = layout.matmul(dy, below.T)
        else:
            up, y = _composed(first, core), saved[0] if saved else None
        if self.update == 'lie_exact':
            adapted = self._adapted(weight, up, down, ratio)
        if need_bias or (need_ratio and bias is not None):
            d_bias = layout.bias_grad(dy, dtype)
        if thin and need_up:
            narrow = layout.matmul(x, cast(down, x.dtype)) if narrow is None else narrow
            d_up = layout.weight_grad(dy, narrow, dtype)
        if thin and need_down and not self.branch:
            rows = times(up, scale) if ratio is None else up * (scale * ratio)[:, None]
            inner = layout.matmul(dy, cast(rows, dy.dtype).T)
        if thin and need_down:
            turned = down.stride(0) < down.stride(1)  # so is the gradient of what it is a view of
            pair = (x, inner) if turned else (inner, x)
            d_down = layout.weight_grad(*pair, dtype)
            d_down = d_down.T if turned else d_down
        if not thin or (need_ratio and (y is None or has_zeros(ratio))):
            memory = scratch.memory(scratch.GRADIENT, weight.shape, dtype, dy)
            dense = layout.weight_grad(dy, x, dtype, memory)
            if self.update != 'additive':
                dense.mul_(weight if self.update == 'lie' else adapted)
            if not thin:
                d_up = product(dense, down.T) if need_up else None
                rows = _composed(first, core) if ratio is None else up * ratio[:, None]
                d_down = product(rows.T, dense, scale) if need_down else None
            if need_ratio:
                d_ratio = (dense * weight).sum(1) + times((d_up * up).sum(1), scale)
        elif need_ratio:
            d_ratio = layout.dot(dy, y, dtype) - (0 if bias is None else bias * d_bias)
            d_ratio = d_ratio.to(dtype) / ratio
        if ratio is not None and d_up is not None:
            d_up = d_up * ratio[:, None]
        if need_x and self.branch:
            dx = matmul_add(layout, dy, weight.T, inner, above.T)
        elif need_x:
            adapted = self._adapted(weight, up, down, ratio) if adapted is None else adapted
            dx = layout.matmul(dy, cast(adapted, dy.dtype).T)
        d_bias = d_bias.to(dy.dtype) if need_bias else None
        d_core = None
        if core is not None and d_up is not None:
            d_up, d_core = product(d_up, core.T, scale), product(first.T, d_up, scale)
        elif d_up is not None:
            d_up = times_(d_up, scale)
        return dx, None, d_bias, d_up, d_core, d_down, d_ratio

    def reference(self, x, weight, bias, up, core, down, ratio):
        adapted = NormalForm(up, core, down, self.update, self.scale).apply(dequantized(weight))
        adapted = adapted if ratio is None else adapted * ratio[:, None]
        x = x if self.layout is ChannelsLast else x.mT
        y = torch.nn.functional.linear(x, adapted.to(x.dtype), bias)
        return y if self.layout is ChannelsLast else y.mT

    def _narrow_factors(self, up, core, down, dtype):
        """V and s U G, which a branch multiplies with."""
        rows = times(up, self.scale) if core is None else product(up, core, self.scale)
        return cast(down, dtype), cast(rows, dtype)

    def _adapted(self, weight, up, down, ratio):
        """W', with float32's precision at least where U and V have it; in :mod:`.cpu.scratch`."""
        out = scratch.memory(scratch.WEIGHT, weight.shape, up.dtype, up)
        if self.update == 'lie_exact':
            # On a CPU torch's powers of 2 take a quarter of the time of its powers of e.
            delta = torch.mm(up * (self.scale / math.log(2)), down, out=out)
            return delta.exp2_().mul_(weight)
        if self.update == 'lie':
            delta = torch.mm(up, down, out=out)
            return torch.addcmul(weight, weight, delta, value=self.scale, out=delta)
        if ratio is None:
            same = cast(weight, up.dtype)
            out = out if same is weight else same
            return torch.addmm(same, up, down, alpha=self.scale, out=out)
        ratio = ratio[:, None]
        return torch.mm(up * (self.scale * ratio), down, out=out).addcmul_(weight, ratio)

    def _change(self, weight, up, down, ratio):
        """W' - W, likewise."""
        if self.update == 'additive':
            return self._adapted(weight, up, down, ratio).sub_(weight)
        delta = product(up, down, self.scale)
        return (delta.expm1_() if self.update == 'lie_exact' else delta).mul_(weight)


def _composed(up, core):
    return up if core is None else up @ core


def thin_pays(positions: int, out: int, features: int, rank: int, sides: int = 2) -> bool:
    """Whether thin products are cheaper than the dense gradient, for one factor or both.

    Thin, by factor: T r (O + I), for x V^T and its product with dy, say. Dense: T O I, and O I r
    by factor.
    """
    thin, dense = positions * (out + features), out * features
    return sides * rank * thin < (positions + sides * rank) * dense


def has_zeros(x: Tensor) -> bool:
    """Whether a tensor has any; one without data has none."""
    return not isinstance(x, FakeTensor) and not x.all()
