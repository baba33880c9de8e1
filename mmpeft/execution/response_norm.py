"""Global response normalization (ConvNeXt V2, arXiv:2301.00808) in few passes.

    y = x * (1 + w n_c / (mean_c n + eps)) + b,     n_c = ||x_c|| over the positions

is affine by channel once the norms are known, and so is its gradient. Written
as such it reads and writes the map half as often as operation by operation,
and needs one map of memory instead of four. Weight and bias are frozen here.
"""

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .matmul import is_low
from .precision import without_autocast
from .recompute import Recipe, remember


class ResponseNorm(Function):
    """y, and the factor (1 + w n / (mean n + eps)) that recomputes it."""

    @staticmethod
    @without_autocast
    def forward(ctx, x, weight, bias, eps, positions, channel):
        norm = _norm(x, positions)
        mean = norm.mean(channel, keepdim=True) + eps
        weight = weight.to(norm.dtype)
        factor = weight * (norm / mean) + 1
        ctx.positions, ctx.channel = positions, channel
        ctx.save_for_backward(x, weight, norm, mean, factor)
        ctx.mark_non_differentiable(factor)
        return _affine(x, factor, bias), factor

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, dy, _):
        x, weight, norm, mean, factor = ctx.saved_tensors
        low, x, dy = x.dtype, x.to(norm.dtype), dy.to(norm.dtype)
        product = dy * x
        d_ratio = product.sum(ctx.positions, keepdim=True) * weight
        shared = (d_ratio * norm).mean(ctx.channel, keepdim=True) / mean.square()
        d_norm = d_ratio / mean - shared
        pull = torch.where(norm > 0, d_norm / norm, 0)
        dx = torch.mul(dy, factor, out=product).addcmul_(x, pull)
        return dx.to(low), None, None, None, None, None


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
    positions = [d for d in range(1, x.ndim) if d != channel]
    shape = [-1 if d == channel else 1 for d in range(x.ndim)]
    weight, bias = weight.view(shape), bias.view(shape)
    y, factor = ResponseNorm.apply(x, weight, bias, eps, positions, channel)
    return remember(y, Recipe(_affine, (x, factor, bias)))


def _affine(x, factor, bias):
    return torch.addcmul(bias.to(factor.dtype), x.to(factor.dtype), factor).to(x.dtype)


def _norm(x, positions):
    if x.device.type == 'cpu' and not is_low(x):
        # torch's own norm over positions is many times slower there.
        return x.square().sum(positions, keepdim=True).sqrt_()
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=positions, keepdim=True, dtype=dtype)
