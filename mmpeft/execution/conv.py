"""Convolutions with an adapted kernel whose dense gradient is never formed, or cheaply.

For W' = W + s dW with dW[o, i, k] = sum_ab U[o, a] G[a, b, k] V[b, i], the
gradients need r channels at both ends of a convolution instead of all:

    dG = the kernel gradient between V x and U^T dy
    dU = dy against G * (V x),      dV = x against G^T * (U^T dy)

A depthwise kernel's gradient is itself a grouped convolution, of the padded
input with dy as the kernel, which is many times faster on a CPU than
autograd's own for large maps.
"""

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .matmul import as_map, as_tokens, layout_of
from .precision import without_autocast

CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Geometry:
    """How a convolution walks over its input; zero padding alone."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @classmethod
    def of(cls, layer: nn.Module) -> 'Geometry':
        """Of a convolution layer whose padding is given in numbers."""
        return cls(tuple(layer.stride), tuple(layer.padding), tuple(layer.dilation))

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The convolution without groups."""
        function = CONVOLVE[weight.ndim - 2]
        return function(x, weight, bias, self.stride, self.padding, self.dilation)

    def positions(self, x: Tensor, weight: Tensor) -> int:
        """Of the output, of one image."""
        sizes = zip(
            x.shape[2:], weight.shape[2:], self.stride, self.padding, self.dilation, strict=True
        )
        return prod((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)

    def gradients(self, dy, x, weight, need_x, need_weight, groups=1):
        """Of input and kernel; None where not needed."""
        dx, d_weight, _ = torch.ops.aten.convolution_backward(
            dy,
            x,
            weight,
            None,
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0] * len(self.stride),
            groups,
            [need_x, need_weight, False],
        )
        return dx, d_weight


class TuckerConv(Function):
    """y = x convolved with W + s G x_1 U x_2 V^T, plus b.

    U (O, a), G (a, b, *k), V (b, I) or None for all I channels. The update is
    put into the weight, or stands beside it (``branch``) as three thin
    convolutions, whose outputs are then kept for backward.
    """

    @staticmethod
    @without_autocast
    def forward(ctx, x, weight, bias, up, core, down, scale, geometry, branch):
        ctx.scale, ctx.geometry, ctx.with_bias = scale, geometry, bias is not None
        ctx.branch = branch
        narrow = inner = None
        if branch:
            narrow = _mix(down, x)
            inner = geometry.convolve(narrow, core.to(x.dtype))
            y = _add(geometry.convolve(x, weight, bias), up * scale, inner)
        else:
            merged = _merged(weight, up, core, down, scale).to(x.dtype)
            y = geometry.convolve(x, merged, bias)
        ctx.save_for_backward(x, weight, up, core, down, narrow, inner)
        return y

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, dy):
        x, weight, up, core, down, narrow, inner = ctx.saved_tensors
        geometry, scale = ctx.geometry, ctx.scale
        need_x, _, need_bias = ctx.needs_input_grad[:3]
        dx = d_down = d_bias = None
        kernel = core.to(x.dtype)
        if narrow is None:
            narrow = _mix(down, x)
            inner = geometry.convolve(narrow, kernel)
        d_inner = _mix(up.T * scale, dy)
        need_narrow = down is not None
        d_narrow, d_core = geometry.gradients(d_inner, narrow, kernel, need_narrow, True)
        d_up = _outer(dy, inner).to(up.dtype).mul_(scale)
        if need_narrow:
            d_down = _outer(d_narrow, x).to(up.dtype)
        if need_x and ctx.branch:
            dx, _ = geometry.gradients(dy, x, weight, True, False)
            dx = _add(dx, down.T, d_narrow)
        elif need_x:
            merged = _merged(weight, up, core, down, scale).to(x.dtype)
            dx, _ = geometry.gradients(dy, x, merged, True, False)
        if need_bias and ctx.with_bias:
            d_bias = dy.sum([d for d in range(dy.ndim) if d != 1])
        return dx, None, d_bias, d_up, d_core.to(up.dtype), d_down, None, None, None


def _merged(weight, up, core, down, scale):
    """W + s G x_1 U x_2 V^T."""
    if down is None:
        spread = core.flatten(1)
    else:
        spread = torch.matmul(down.T, core.flatten(2)).flatten(1)
    merged = torch.addmm(weight.flatten(1).to(up.dtype), up, spread, alpha=scale)
    return merged.view(weight.shape)


def _mix(matrix, x):
    """Channels of a map through a matrix (out, in); the map itself without one."""
    if matrix is None:
        return x
    layout = layout_of(x)
    y = layout.times(as_tokens(x, layout), matrix.to(x.dtype))
    return as_map(y, layout, x.shape[2:])


def _add(y, matrix, x):
    """y + the channels of x through a matrix; ``y`` is used up."""
    layout = layout_of(y)
    layout.accumulate(as_tokens(y, layout), as_tokens(x, layout), matrix.to(y.dtype))
    return y


def _outer(left, right):
    """Sum over images and positions of left right^T; (A, B)."""
    layout = layout_of(right)
    return layout.outer(as_tokens(left, layout), as_tokens(right, layout))


class DepthwiseConv(Function):
    """A depthwise 2-d convolution of stride 1 with another way to its kernel's gradient."""

    @staticmethod
    @without_autocast
    def forward(ctx, x, weight, bias, geometry):
        ctx.geometry, ctx.with_bias = geometry, bias is not None
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=geometry.padding, groups=len(weight))

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        geometry = ctx.geometry
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        dx = d_weight = d_bias = None
        if need_x:
            dx, _ = geometry.gradients(dy, x, weight, True, False, groups=len(weight))
        if need_weight:
            d_weight = depthwise_kernel_gradient(x, dy, weight.shape, geometry.padding)
        if need_bias and ctx.with_bias:
            d_bias = dy.sum((0, 2, 3))
        return dx, d_weight, d_bias, None


def depthwise_kernel_gradient(x: Tensor, dy: Tensor, shape, padding) -> Tensor:
    """The gradient of a depthwise kernel at stride 1, as a grouped convolution.

    Args:
        x: Input, (N, C, H, W).
        dy: Gradient of the output, (N, C, H', W').
        shape: Of the kernel, (C, 1, kh, kw).
        padding: Zeros around the input.

    Returns:
        (C, 1, kh, kw)
    """
    images, channels = x.shape[:2]
    x = x.reshape(1, images * channels, *x.shape[2:])
    dy = dy.reshape(images * channels, 1, *dy.shape[2:])
    gradient = F.conv2d(x, dy, padding=padding, groups=images * channels)
    return gradient.view(images, channels, *shape[2:]).sum(0).unsqueeze(1)
