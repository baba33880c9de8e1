"""Houlsby's and Pfeiffer's adapters: a bottleneck after a branch (arXiv:1902.00751, 2005.00052).

    y -> y + h(y A + a) B + b            Subspace tuning, Eq. 22 to 24

with y the output of a branch before the residual addition, h a non-linearity,
A (d, r) and B (r, d). A starts uniform as a linear layer's, all else at zero,
so that the start is the identity; Houlsby starts with a small Gaussian in both.

Houlsby     after attention and MLP
Pfeiffer    after the MLP alone; in the papers before or after the norm of a
            post-norm block, which pre-norm vision transformers do not have

In ConvNeXt the depthwise convolution takes the place of attention. Where a
residual branch is a chain of convolutions, as in ResNet, one adapter at its end
takes the place of both. On maps the bottleneck is a pair of 1x1 convolutions.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.methods.base import Card, Factors, register, uniform
from mmpeft.methods.ranked import Ranked
from mmpeft.methods.spec import CONVOLUTIONS

from .base import BranchMethod

ACTIVATIONS = {'gelu': F.gelu, 'relu': F.relu, 'swish': F.silu, 'identity': nn.Identity()}
Activation = Literal['gelu', 'relu', 'swish', 'identity']


def across_channels(
    x: Tensor, weight: Tensor, bias: Tensor | None, axis: int, groups: int = 1
) -> Tensor:
    """One linear map of the channels at every position.

    Args:
        x: (..., m), or a map (N, m, *size) or (m, *size) of 1 to 3 axes.
        weight: (n, m / groups).
        bias: (n,) or None.
        axis: The channels' position.
        groups: Of the channels of a map.

    Returns:
        ``x`` with n channels.
    """
    axes = x.ndim - 1 - axis % x.ndim
    if not axes:
        return F.linear(x, weight, bias)
    return CONVOLUTIONS[axes](x, weight.view(*weight.shape, *(1,) * axes), bias, groups=groups)


@register
class HoulsbyAdapter(Ranked, BranchMethod):
    """A bottleneck of ``rank`` r after attention and MLP; ``activation`` is h."""

    card = Card(
        family='activations',
        formula='y + h(y A + a) B + b after attention and MLP',
        suits='Transformers and ConvNeXt, where slower inference is fine; the classic baseline.',
    )

    kinds = ('attention', 'mixer', 'mlp', 'branch')
    activation: Activation = 'gelu'

    def init(self, weight, point) -> Factors:
        width = point.out_features
        return {
            'down': uniform(weight, self.rank, width),
            'down_bias': weight.new_zeros(self.rank),
            'up': weight.new_zeros(width, self.rank),
            'up_bias': weight.new_zeros(width),
        }

    def branch(self, x, y, factors, point):
        y = y.to(factors['down'].dtype)
        inner = across_channels(y, factors['down'], factors['down_bias'], point.axis)
        active = ACTIVATIONS[self.activation](inner)
        return across_channels(active, factors['up'], factors['up_bias'], point.axis)


@register
class PfeifferAdapter(HoulsbyAdapter):
    """A bottleneck after the MLP alone."""

    card = Card(
        family='activations',
        formula='y + h(y A + a) B + b after the MLP',
        suits="Half of Houlsby's parameters and time, with about its accuracy.",
    )

    kinds = ('mlp', 'branch')
    activation: Activation = 'relu'
