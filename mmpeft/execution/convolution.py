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

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

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

    U (O, a), G (a, b, *k), V (b, I) or None for all I channels.
    """

    @staticmethod
    @without_autocast
    def forward(ctx, x, weight, bias, up, core, down, scale, geometry):
        ctx.scale, ctx.geometry, ctx.with_bias = scale, geometry, bias is not None
        ctx.save_for_backward(x, weight, up, core, down)
        merged = _merged(weight, up, core, down, scale).to(x.dtype)
        return geometry.convolve(x, merged, bias)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, dy):
        x, weight, up, core, down = ctx.saved_tensors
        geometry, scale = ctx.geometry, ctx.scale
        need_x, _, need_bias = ctx.needs_input_grad[:3]
        dx = d_bias = None
        if need_x:
            merged = _merged(weight, up, core, down, scale).to(x.dtype)
            dx, _ = geometry.gradients(dy, x, merged, True, False)
        core = core.to(x.dtype)
        narrow_x = x if down is None else _mix(down.to(x.dtype), x)
        narrow_dy = _mix(up.T.to(x.dtype), dy)
        d_narrow_x, d_core = geometry.gradients(narrow_dy, narrow_x, core, down is not None, True)
        d_up = _channels(dy, geometry.convolve(narrow_x, core)).to(up.dtype).mul_(scale)
        d_core = d_core.to(up.dtype).mul_(scale)
        d_down = None
        if down is not None:
            d_down = _channels(d_narrow_x, x).to(up.dtype).mul_(scale)
        if need_bias and ctx.with_bias:
            d_bias = dy.sum([d for d in range(dy.ndim) if d != 1])
        return dx, None, d_bias, d_up, d_core, d_down, None, None


def _merged(weight, up, core, down, scale):
    if down is not None:
        core = torch.tensordot(core, down, dims=([1], [0])).movedim(-1, 1)
    delta = up @ core.flatten(1)
    return torch.add(weight.to(up.dtype), delta.view(weight.shape), alpha=scale)


def _mix(matrix, x):
    """Channels of a map through a matrix (out, in)."""
    return CONVOLVE[x.ndim - 2](x, matrix[(...,) + (None,) * (x.ndim - 2)])


def _channels(left, right):
    """Sum over images and positions of left right^T; (A, B)."""
    if len(left) == 1 and left.is_contiguous() and right.is_contiguous():
        return left[0].flatten(1) @ right[0].flatten(1).T
    return left.movedim(1, -1).flatten(0, -2).T @ right.movedim(1, -1).flatten(0, -2)


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
