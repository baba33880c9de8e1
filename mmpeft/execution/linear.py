"""Products with an adapted matrix that is not kept, and whose gradient is formed only if it pays.

For W' = W + s U V autograd forms W' in forward, keeps it, and in backward
forms dy^T x (O, I) only to multiply it with V and U. Here W' is built again in
backward, and the gradients of U and V come from products with x V^T and dy U,
r wide.

Shapes: ``x`` a map of I channels and ``dy`` one of O, in the layout of
:mod:`.matmul`; ``weight`` W (O, I), frozen; ``bias`` b (O,) or None; ``up`` U
(O, r), ``down`` V (r, I), ``magnitude`` m (O,). The result is a map of O
channels, and each gradient has its argument's shape.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mmpeft.methods.normal_form import NormalForm

from .costs import thin_pays
from .function import FastFunction
from .matmul import ChannelsLast, Layout, is_low, linear, matmul_add


@dataclass(frozen=True, eq=False)
class LowRankLinear(FastFunction):
    """y = x (W + s U V)^T + b.

    Attributes:
        layout: Of the maps.
        scale: s
        branch: Compute the update beside the product instead of in W. Needed in low precision,
            where W' itself would round a small update away.
    """

    recomputes_input: ClassVar = True
    layout: Layout
    scale: float
    branch: bool

    def forward(self, x, weight, bias, up, down):
        if not self.branch:
            return self.layout.matmul(x, added(weight, up, down, self.scale), bias), (None,)
        narrow = self.layout.matmul(x, down)
        return matmul_add(self.layout, x, weight, narrow, up * self.scale, bias), (narrow,)

    def gradients(self, needs, dy, x, weight, bias, up, down, narrow):
        need_x, _, need_bias, need_up, need_down = needs
        layout, scale, dy = self.layout, self.scale, dy.contiguous()
        dx = d_up = d_down = inner = None
        thin = thin_pays(*weight.shape, len(down))
        if thin or (need_x and self.branch):
            inner = layout.matmul(dy, (up * scale).T)
        if thin:
            if need_up:
                narrow = layout.matmul(x, down) if narrow is None else narrow
                d_up = layout.weight_grad(dy, narrow).mul_(scale)
            if need_down:
                d_down = layout.weight_grad(inner, x)
        else:
            dense = layout.weight_grad(dy, x)
            d_up = torch.mm(dense, down.T).mul_(scale)
            d_down = torch.mm(up.T, dense).mul_(scale)
        if need_x and self.branch:
            dx = matmul_add(layout, dy, weight.T, inner, down.T)
        elif need_x:
            dx = layout.matmul(dy, added(weight, up, down, scale).T)
        return dx, None, layout.bias_grad(dy) if need_bias else None, d_up, d_down

    def reference(self, x, weight, bias, up, down):
        form = NormalForm(up, None, down, scale=self.scale)
        return plain_product(self.layout, x, form.apply(weight), bias)


@dataclass(frozen=True, eq=False)
class MultiplicativeLinear(FastFunction):
    """y = x (W * (1 + s U V))^T + b, or with exp(s U V).

    Attributes:
        layout: Of the maps.
        scale: s
        exact: Whether it is exp.
    """

    recomputes_input: ClassVar = True
    layout: Layout
    scale: float
    exact: bool

    def forward(self, x, weight, bias, up, down):
        return product(self.layout, x, weight, self._adapted(weight, up, down), bias), ()

    def gradients(self, needs, dy, x, weight, bias, up, down):
        need_x, _, need_bias, need_up, need_down = needs
        layout, dy = self.layout, dy.contiguous()
        dx = d_up = d_down = adapted = None
        if need_x or self.exact:
            adapted = self._adapted(weight, up, down)
        if need_x:
            dx = layout.matmul(dy, adapted.to(dy.dtype).T)
        if need_up or need_down:
            dense = layout.weight_grad(dy, x).to(up.dtype).mul_(adapted if self.exact else weight)
            d_up = linear(dense, down).mul_(self.scale)
            d_down = linear(up.T, dense.T).mul_(self.scale)
        return dx, None, layout.bias_grad(dy) if need_bias else None, d_up, d_down

    def reference(self, x, weight, bias, up, down):
        update = 'lie_exact' if self.exact else 'lie'
        form = NormalForm(up, None, down, update, self.scale)
        return plain_product(self.layout, x, form.apply(weight), bias)

    def _adapted(self, weight, up, down):
        if self.exact:
            # On a CPU torch's powers of 2 take a quarter of the time of its powers of e.
            return linear(up * (self.scale / math.log(2)), down.T).exp2_().mul_(weight)
        delta = linear(up, down.T)
        memory = None if torch.compiler.is_compiling() else delta
        return torch.addcmul(weight, weight, delta, value=self.scale, out=memory)


@dataclass(frozen=True, eq=False)
class NormalizedLinear(FastFunction):
    """y = x (m / ||D|| * D)^T + b by rows of the direction D = W + s U V.

    Attributes:
        layout: Of the maps.
        scale: s
        detach: Whether ||D|| counts as a constant in backward.
    """

    recomputes_input: ClassVar = True
    layout: Layout
    scale: float
    detach: bool

    def forward(self, x, weight, bias, up, down, magnitude):
        direction = added(weight, up, down, self.scale)
        norm = torch.linalg.vector_norm(direction, dim=1)
        ratio = torch.where(norm > 0, magnitude / norm.clamp_min(1e-30), 1)
        y = product(self.layout, x, weight, direction.mul_(ratio[:, None]), bias)
        return y, (norm, ratio, y)

    def gradients(self, needs, dy, x, weight, bias, up, down, magnitude, norm, ratio, y):
        layout, dtype, dy = self.layout, up.dtype, dy.contiguous()
        direction = added(weight, up, down, self.scale)
        narrow = layout.matmul(x, down.to(x.dtype))
        d_up = layout.weight_grad(dy, narrow).to(dtype).mul_(ratio[:, None])
        inner = layout.matmul(dy, (up * ratio[:, None]).to(dy.dtype).T)
        d_down = layout.weight_grad(inner, x).to(dtype)
        d_bias = None if bias is None else layout.bias_grad(dy)

        # d_ratio = sum of dy (y - b) / ratio
        if y is None:
            y = layout.matmul(x, (direction * ratio[:, None]).to(x.dtype), bias)
        d_ratio = layout.bias_grad(dy * y)
        if bias is not None:
            d_ratio -= bias * d_bias
        d_ratio = d_ratio.to(dtype) / ratio
        if _has_zeros(ratio):
            lost = (layout.weight_grad(dy, x).to(dtype) * direction).sum(1)
            d_ratio = torch.where(ratio == 0, lost, d_ratio)

        d_magnitude = torch.where(norm > 0, d_ratio / norm.clamp_min(1e-30), 0)
        if not self.detach:
            # d||D|| / dD = D / ||D||
            pulled = direction * (-d_magnitude * ratio / norm.clamp_min(1e-30))[:, None]
            d_up = d_up + pulled @ down.T
            d_down = d_down + up.T @ pulled
        dx = None
        if needs[0]:
            dx = layout.matmul(dy, direction.mul_(ratio[:, None]).to(dy.dtype).T)
        d_bias = d_bias if needs[2] else None
        return dx, None, d_bias, d_up * self.scale, d_down * self.scale, d_magnitude

    def reference(self, x, weight, bias, up, down, magnitude):
        form = NormalForm(
            up, None, down, scale=self.scale, magnitude=magnitude, detach_norm=self.detach
        )
        return plain_product(self.layout, x, form.apply(weight), bias)


def _has_zeros(x):
    """Whether a tensor has, as far as that can be asked."""
    if torch.compiler.is_compiling():
        return True
    return not isinstance(x, FakeTensor) and not x.all()


def added(weight: Tensor, up: Tensor, down: Tensor, scale: float) -> Tensor:
    """W + s U V, in the dtype of U and V."""
    return linear(up * scale, down.T).add_(weight)


def product(
    layout: Layout, x: Tensor, weight: Tensor, adapted: Tensor, bias: Tensor | None
) -> Tensor:
    """x W'^T + b.

    In low precision W' - W is multiplied apart, since W' itself would round a small update away.

    Args:
        layout: Of the maps.
        x: Map of I channels.
        weight: W, (O, I), of the dtype of ``x``.
        adapted: W', (O, I), with float32's precision at least; it is used up.
        bias: b, (O,).

    Returns:
        Map of O channels.
    """
    if not is_low(x):
        return layout.matmul(x, adapted, bias)
    y = layout.matmul(x, adapted.sub_(weight).to(x.dtype), bias)
    return layout.accumulate(y, x, weight)


def plain_product(layout: Layout, x: Tensor, adapted: Tensor, bias: Tensor | None) -> Tensor:
    """x W'^T + b by torch alone; shapes as in :func:`product`."""
    x = x if layout is ChannelsLast else x.mT
    y = torch.nn.functional.linear(x, adapted.to(x.dtype), bias)
    return y if layout is ChannelsLast else y.mT
