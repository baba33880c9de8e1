"""Mona: filters of several sizes behind attention and MLP (arXiv:2408.08345).

    x -> x + gelu(F(U D)) V                 U = s1 norm(x) + s2 x
    F(z) = c + c P,  c = z + (dw3(z) + dw5(z) + dw7(z)) / 3

with x the features behind a residual addition, D (d, r) and V (r, d) with biases,
norm a layer norm with weight and bias, s1 and s2 one number a channel, dwk depthwise convolutions
of k x k and P a 1x1 convolution, all with biases. A block with attention has two of them, one
between attention and MLP and one at its end; a residual block of convolutions, as of ConvNeXt,
and any block that does not have two norms of its own, one at its end. Class tokens and registers
are maps of one position each.

V starts at zero, so that the start is the identity (in the authors' program as a linear layer
does), all else as there: s1 at 1e-6, s2 and the norm at 1, the rest uniform. But biases start at
zero here, and the depthwise convolutions have one bias together. The program drops entries of what
gelu returns with a probability of 0.1; this has no dropout.
"""

import torch.nn.functional as F
from torch import Tensor

from mmpeft.methods.base import Card, Factors, register, uniform
from mmpeft.methods.ranked import Ranked
from mmpeft.methods.spec import InsertionPoint

from .base import ActivationMethod
from .bottleneck import across_channels
from .maps import on_maps

SIZES = 3, 5, 7


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, axis: int) -> Tensor:
    """A layer norm over the channels at an axis."""
    return F.layer_norm(x.movedim(axis, -1), weight.shape, weight, bias).movedim(-1, axis)


@register
class Mona(Ranked, ActivationMethod):
    """Depthwise filters in a bottleneck of ``rank`` r behind each residual addition."""

    card = Card(
        family='activations',
        formula='x + h(F(U A)) B, F depthwise 3x3, 5x5 and 7x7, after each residual addition',
        suits='Detection and segmentation with Swin, where the paper has it above full tuning.',
    )

    kinds = ('block',)
    needs_grid = True
    rank: int = 64

    def init(self, weight, point) -> Factors:
        places = ('', 'inner_') if point.ends else ('',)
        return {
            place + name: value
            for place in places
            for name, value in self.one(weight, point.out_features).items()
        }

    def one(self, weight: Tensor, width: int) -> Factors:
        """Initial values of one Mona."""
        rank = self.rank
        filters = {f'filter_{k}': uniform(weight, rank, 1, k, k) for k in SIZES}
        return {
            'norm_weight': weight.new_ones(width),
            'norm_bias': weight.new_zeros(width),
            'scale_norm': weight.new_full((width,), 1e-6),
            'scale_input': weight.new_ones(width),
            'down': uniform(weight, rank, width),
            'down_bias': weight.new_zeros(rank),
            **filters,
            'filter_bias': weight.new_zeros(rank),
            'mixer': uniform(weight, rank, rank),
            'mixer_bias': weight.new_zeros(rank),
            'up': weight.new_zeros(width, rank),
            'up_bias': weight.new_zeros(width),
        }

    def inside(self, x, factors, point):
        own = {k.removeprefix('inner_'): v for k, v in factors.items() if k.startswith('inner_')}
        return self.added(x, own, point)

    def after(self, x, y, factors, point):
        added = self.added(y, factors, point)
        return (y.to(added.dtype) + added).to(y.dtype)

    def added(self, x: Tensor, factors: Factors, point: InsertionPoint) -> Tensor:
        """What one Mona adds to features."""
        x = x.to(factors['down'].dtype)
        axis = point.axis if x.ndim == 4 else -1  # a convolutional MLP may stand among tokens
        scales = factors['scale_norm'], factors['scale_input']
        if axis % x.ndim != x.ndim - 1:
            scales = [scale[:, None, None] for scale in scales]
        normed = layer_norm(x, factors['norm_weight'], factors['norm_bias'], axis)
        inner = across_channels(
            scales[0] * normed + scales[1] * x, factors['down'], factors['down_bias'], axis
        )

        def filtered(z):
            filters = {k: factors[f'filter_{k}'] for k in SIZES}
            maps = [F.conv2d(z, f, padding=k // 2, groups=len(f)) for k, f in filters.items()]
            z = z + sum(maps) / len(maps) + factors['filter_bias'][:, None, None]
            return z + across_channels(z, factors['mixer'], factors['mixer_bias'], 1)

        active = F.gelu(on_maps(filtered, inner, axis, point.grid))
        return across_channels(active, factors['up'], factors['up_bias'], axis)
