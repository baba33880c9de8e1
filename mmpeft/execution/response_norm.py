"""Global response normalization (ConvNeXt V2, arXiv:2301.00808) in few passes.

    y = x * (1 + w n_c / (mean_c n + eps)) + b,     n_c = ||x_c|| over the positions

is affine by channel once the norms are known, and so is its gradient. Written
as such it reads and writes the map half as often as operation by operation,
and needs one map of memory instead of four. Weight and bias are frozen here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mmpeft.methods.precision import outside_autocast

from .cpu.norm import norm_over
from .function import FastFunction
from .matmul import is_low
from .recompute import tag_for_recompute


@dataclass(frozen=True, eq=False)
class ResponseNorm(FastFunction):
    """y, with the norms known.

    Shapes: ``x``, ``dy`` and y (N, H, W, C) or (N, C, H, W); ``weight`` and ``bias``
    broadcastable to them, ``norm`` n, ``mean`` (mean n + eps) and ``factor`` (1 + w n / mean)
    too. Only ``x`` has a gradient.

    Attributes:
        positions: Dimensions of the positions.
        channel: Dimension of the channels.
        eps: Added to the mean norm.
    """

    positions: tuple[int, ...]
    channel: int
    eps: float

    def forward(self, x, weight, bias, norm, mean, factor):
        return _affine(x, factor, bias), ()

    def gradients(self, needs, dy, x, weight, bias, norm, mean, factor):
        dtype, x, dy = x.dtype, x.to(norm.dtype), dy.to(norm.dtype)
        product = dy * x
        d_ratio = product.sum(self.positions, keepdim=True) * weight
        shared = (d_ratio * norm).mean(self.channel, keepdim=True) / mean.square()
        d_norm = d_ratio / mean - shared
        pull = torch.where(norm > 0, d_norm / norm, 0)
        return (torch.mul(dy, factor, out=product).addcmul_(x, pull).to(dtype),)

    def reference(self, x, weight, bias, *known):
        dtype, x = x.dtype, x.to(weight.dtype)
        norm = torch.linalg.vector_norm(x, dim=self.positions, keepdim=True)
        mean = norm.mean(self.channel, keepdim=True) + self.eps
        return (x * (1 + weight * norm / mean) + bias).to(dtype)


def response_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, channel: int) -> Tensor:
    """Global response normalization of a map.

    Args:
        x: (N, H, W, C) or (N, C, H, W).
        weight: (C,), frozen.
        bias: Likewise.
        eps: Added to the mean norm.
        channel: Which dimension the channels are.

    Returns:
        Of the shape and dtype of ``x``.
    """
    channel %= x.ndim
    positions = tuple(d for d in range(1, x.ndim) if d != channel)
    shape = [-1 if d == channel else 1 for d in range(x.ndim)]
    with torch.no_grad(), outside_autocast(x.device.type):
        norm = _norm(x, positions)
        mean = norm.mean(channel, keepdim=True) + eps
        weight, bias = weight.view(shape).to(norm.dtype), bias.view(shape).to(norm.dtype)
        factor = weight * (norm / mean) + 1
    y = ResponseNorm(positions, channel, eps)(x, weight, bias, norm, mean, factor)
    return tag_for_recompute(y, _affine, x, factor, bias)


def _affine(x, factor, bias):
    return torch.addcmul(bias, x.to(factor.dtype), factor).to(x.dtype)


def _norm(x, positions):
    if x.device.type == 'cpu' and not is_low(x):
        return norm_over(x, positions)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=positions, keepdim=True, dtype=dtype)
