"""Global response normalization (ConvNeXt V2, arXiv:2301.00808) in few passes.

    y = x * (1 + w n_c / (mean_c n + eps)) + b,     n_c = ||x_c|| over the positions

is affine by channel once the norms are known, and so is its gradient. Written
as such it reads and writes the map half as often as operation by operation,
and needs one map of memory instead of four. Weight and bias are frozen here.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmpeft.methods.precision import outside_autocast

from .function import FastFunction
from .matmul import is_low
from .recompute import tag_for_recompute, through


@dataclass(eq=False)
class ResponseNorm(FastFunction):
    """y from x and its norms.

    Shapes: ``x`` and y (N, H, W, C) or (N, C, H, W); ``weight`` w and ``bias`` b broadcastable
    to them, the norms n too, with N. Only x has a gradient, of its shape. ``positions`` and
    ``channel`` are dimensions of x; ``eps`` is added to the mean norm.
    """

    recomputes_input: ClassVar = True
    positions: tuple[int, ...]
    channel: int
    eps: float

    def forward(self, save, x, weight, bias, norm):
        return self.affine(x, weight, bias, norm)

    def gradients(self, needs, dy, x, weight, bias, norm):
        dtype, x, dy = x.dtype, x.to(norm.dtype), dy.to(norm.dtype)
        factor, mean = self._factor(weight, norm)
        product = dy * x
        d_ratio = product.sum(self.positions, keepdim=True) * weight
        shared = (d_ratio * norm).mean(self.channel, keepdim=True) / mean.square()
        pull = torch.where(norm > 0, (d_ratio / mean - shared) / norm, 0)
        return (torch.mul(dy, factor, out=product).addcmul_(x, pull).to(dtype),)

    def reference(self, x, weight, bias, norm):
        norm = torch.linalg.vector_norm(x.to(norm.dtype), dim=self.positions, keepdim=True)
        return self.affine(x, weight, bias, norm)

    def affine(self, x: Tensor, weight: Tensor, bias: Tensor, norm: Tensor) -> Tensor:
        """y, with the norms as constants."""
        factor, _ = self._factor(weight, norm)
        return torch.addcmul(bias, x.to(norm.dtype), factor).to(x.dtype)

    def again(self, x: Tensor, weight: Tensor, bias: Tensor, norm: Tensor) -> Tensor:
        """y in backward; where that is differentiated, the norms depend on x."""
        compute = self.reference if torch.is_grad_enabled() else self.affine
        return compute(x, weight, bias, norm)

    def _factor(self, weight, norm):
        mean = norm.mean(self.channel, keepdim=True) + self.eps
        return weight * (norm / mean) + 1, mean


def response_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, channel: int) -> Tensor:
    """y of the shape and dtype of x, as in :class:`ResponseNorm`; weight and bias are (C,)."""
    channel %= x.ndim
    positions = tuple(d for d in range(1, x.ndim) if d != channel)
    shape = [-1 if d == channel else 1 for d in range(x.ndim)]
    with torch.no_grad(), outside_autocast(x.device.type):
        if x.device.type == 'cpu' and not is_low(x):
            # torch's own norm over several dimensions takes many times as long there.
            norm = x.square().sum(positions, keepdim=True).sqrt_()
        else:
            dtype = torch.promote_types(x.dtype, torch.float32)
            norm = torch.linalg.vector_norm(x, dim=positions, keepdim=True, dtype=dtype)
        arguments = weight.view(shape).to(norm.dtype), bias.view(shape).to(norm.dtype), norm
    function = ResponseNorm(positions, channel, eps)
    y = function(x, *arguments)
    again, kept = through(function.again, x, *arguments)
    return tag_for_recompute(y, again, *kept)
