"""Convolutions with an adapted kernel W' that do not keep it.

For W' = W + s dW with dW[o, i, k] = sum_ab U[o, a] G[a, b, k] V[b, i], the
gradients need r channels at both ends of a convolution instead of all:

    dG = the kernel gradient between V x and U^T dy
    dU = dy against G * (V x),      dV = x against G^T * (U^T dy)

Where that does not pay, the dense gradient is formed, and not kept either.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmpeft.methods.normal_form import NormalForm
from mmpeft.methods.spec import ConvGeometry

from .cpu import scratch
from .function import FastFunction
from .matmul import flat, layout_of, times, times_, unflat
from .recompute import cast


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
        thin: Compute the gradients by thin convolutions, as a branch does, instead of from the
            dense one.
    """

    recomputes_input: ClassVar = True
    geometry: ConvGeometry
    scale: float
    branch: bool
    thin: bool = True

    def forward(self, save, x, weight, bias, up, core, down):
        if not self.branch:
            save(None, None)
            return self.geometry.convolve(x, self._adapted(x, weight, up, core, down), bias)
        narrow = _mix(down, x)
        inner = self.geometry.convolve(narrow, cast(core, x.dtype))
        save(narrow, inner)
        y = self.geometry.convolve(x, weight, bias)
        _accumulate(y, times(up, self.scale), inner)
        return y

    def gradients(self, needs, dy, x, weight, bias, up, core, down, narrow, inner):
        find = self._by_thin_convolutions if self.branch or self.thin else self._from_dense
        dx, *factors = find(needs[0], dy, x, weight, up, core, down, narrow, inner)
        d_bias = dy.sum([d for d in range(dy.ndim) if d != 1]) if needs[2] else None
        return dx, None, d_bias, *factors

    def _by_thin_convolutions(self, need_x, dy, x, weight, up, core, down, narrow, inner):
        geometry, kernel, dtype = self.geometry, cast(core, x.dtype), up.dtype
        dx = d_down = None
        if narrow is None:
            narrow = _mix(down, x)
            inner = geometry.convolve(narrow, kernel)
        d_inner = _mix(times(up.T, self.scale), dy)
        need_both = [down is not None, True]
        d_narrow, d_core = convolution_gradients(geometry, d_inner, narrow, kernel, need_both)
        d_up = times_(_weight_grad(dy, inner, dtype), self.scale)
        if down is not None:
            d_down = _weight_grad(d_narrow, x, dtype)
        if need_x:
            frozen = weight if self.branch else self._adapted(x, weight, up, core, down)
            dx, _ = convolution_gradients(geometry, dy, x, frozen, [True, False])
            if self.branch:
                _accumulate(dx, down.T, d_narrow)
        return dx, d_up, cast(d_core, dtype), d_down

    def _from_dense(self, need_x, dy, x, weight, up, core, down, *_):
        adapted, needs = self._adapted(x, weight, up, core, down), [need_x, True]
        dx, dense = convolution_gradients(self.geometry, dy, x, adapted, needs)
        dense = cast(dense.flatten(1), up.dtype)
        d_up = times_(dense @ NormalForm(up, core, down).unfolded().T, self.scale)
        d_core, d_down = times(up.T, self.scale) @ dense, None
        if down is not None:
            within = d_core.view(core.shape[0], down.shape[1], -1)
            d_down = (core.flatten(2) @ within.mT).sum(0)
            d_core = down @ within
        return dx, d_up, d_core.view(core.shape), d_down

    def reference(self, x, weight, bias, up, core, down):
        form = NormalForm(up, core, down, scale=self.scale)
        return self.geometry.convolve(x, form.apply(weight).to(x.dtype), bias)

    def _adapted(self, x, weight, up, core, down):
        frozen, down = cast(weight.flatten(1), up.dtype), NormalForm(up, core, down).unfolded()
        out = scratch.memory(scratch.WEIGHT, frozen.shape, up.dtype, up)
        adapted = torch.addmm(frozen, up, down, alpha=self.scale, out=out)
        return cast(adapted.view(weight.shape), x.dtype)


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
    gradients = torch.ops.aten.convolution_backward.default
    return gradients(dy, x, weight, None, *how, groups, [*needs, False])[:2]


def _mix(matrix, x):
    """Channels of a map (N, m, *size) through a matrix (n, m); the map itself without one."""
    if matrix is None:
        return x
    layout = layout_of(x)
    y = layout.matmul(flat(x, layout), cast(matrix, x.dtype))
    return unflat(y, layout, x.shape[2:])


def _accumulate(y, matrix, x):
    """Add the channels of x through a matrix to y."""
    layout = layout_of(y)
    layout.accumulate(flat(y, layout), flat(x, layout), cast(matrix, y.dtype))


def _weight_grad(dy, x, dtype):
    """Sum over images and positions of dy times x; (O, I)."""
    layout = layout_of(x)
    return layout.weight_grad(flat(dy, layout), flat(x, layout), dtype)
