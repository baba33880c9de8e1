"""Convolutions with an adapted kernel whose dense gradient is never formed.

For W' = W + s dW with dW[o, i, k] = sum_ab U[o, a] G[a, b, k] V[b, i], the
gradients need r channels at both ends of a convolution instead of all:

    dG = the kernel gradient between V x and U^T dy
    dU = dy against G * (V x),      dV = x against G^T * (U^T dy)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mmpeft.methods.normal_form import NormalForm
from mmpeft.methods.spec import ConvGeometry

from .function import FastFunction
from .matmul import flat, layout_of, unflat


@dataclass(eq=False)
class TuckerConv(FastFunction):
    """y = x convolved with W + s G x_1 U x_2 V^T, plus b, without groups.

    Shapes: ``x`` (N, I, *size); ``weight`` W (O, I, *kernel), frozen; ``bias`` b (O,) or None;
    ``up`` U (O, a); ``core`` G (a, b, *kernel); ``down`` V (b, I), or None for the identity,
    b = I. The result is (N, O, *size'), and each gradient has its argument's shape.

    Attributes:
        geometry: Of the layer, with zeros alone and as many before an axis as after it.
        scale: s
        branch: Compute the update as three thin convolutions beside the layer, whose outputs
            are kept for backward, instead of in W. Only with V.
    """

    geometry: ConvGeometry
    scale: float
    branch: bool

    def forward(self, x, weight, bias, up, core, down):
        if not self.branch:
            adapted = self._adapted(x, weight, up, core, down)
            return self.geometry.convolve(x, adapted, bias), (None, None)
        narrow = _mix(down, x)
        inner = self.geometry.convolve(narrow, core.to(x.dtype))
        y = _accumulate(self.geometry.convolve(x, weight, bias), up * self.scale, inner)
        return y, (narrow, inner)

    def gradients(self, needs, dy, x, weight, bias, up, core, down, narrow, inner):
        geometry, kernel, dtype = self.geometry, core.to(x.dtype), up.dtype
        dx = d_down = None
        if narrow is None:
            narrow = _mix(down, x)
            inner = geometry.convolve(narrow, kernel)
        d_inner = _mix(up.T * self.scale, dy)
        need_both = [down is not None, True]
        d_narrow, d_core = convolution_gradients(geometry, d_inner, narrow, kernel, need_both)
        d_up = _weight_grad(dy, inner).to(dtype).mul_(self.scale)
        if down is not None:
            d_down = _weight_grad(d_narrow, x).to(dtype)
        if needs[0]:
            frozen = weight if self.branch else self._adapted(x, weight, up, core, down)
            dx, _ = convolution_gradients(geometry, dy, x, frozen, [True, False])
            dx = _accumulate(dx, down.T, d_narrow) if self.branch else dx
        d_bias = dy.sum([d for d in range(dy.ndim) if d != 1]) if needs[2] else None
        return dx, None, d_bias, d_up, d_core.to(dtype), d_down

    def reference(self, x, weight, bias, up, core, down):
        form = NormalForm(up, core, down, scale=self.scale)
        return self.geometry.convolve(x, form.apply(weight).to(x.dtype), bias)

    def _adapted(self, x, weight, up, core, down):
        spread = core.flatten(1) if down is None else (down.T @ core.flatten(2)).flatten(1)
        adapted = torch.addmm(weight.flatten(1).to(up.dtype), up, spread, alpha=self.scale)
        return adapted.view(weight.shape).to(x.dtype)


def convolution_gradients(
    geometry: ConvGeometry,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    needs: list[bool],
    groups: int = 1,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x (N, I, *size) and W (O, I / groups, *kernel) by that of y (N, O, *size').

    The geometry has zeros alone, as many before an axis as after it. ``needs`` says which of the
    two are needed; the other is None.
    """
    how = geometry.stride, geometry.zeros, geometry.dilation, False, [0] * len(geometry.stride)
    gradients = torch.ops.aten.convolution_backward
    return gradients(dy, x, weight, None, *how, groups, [*needs, False])[:2]


def _mix(matrix, x):
    """Channels of a map (N, m, *size) through a matrix (n, m); the map itself without one."""
    if matrix is None:
        return x
    layout = layout_of(x)
    y = layout.matmul(flat(x, layout), matrix.to(x.dtype))
    return unflat(y, layout, x.shape[2:])


def _accumulate(y, matrix, x):
    """y + the channels of x through a matrix, in the memory of y."""
    layout = layout_of(y)
    layout.accumulate(flat(y, layout), flat(x, layout), matrix.to(y.dtype))
    return y


def _weight_grad(dy, x):
    """Sum over images and positions of dy times x; (O, I)."""
    layout = layout_of(x)
    return layout.weight_grad(flat(dy, layout), flat(x, layout))
