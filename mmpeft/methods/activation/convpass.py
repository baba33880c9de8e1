"""Convpass: a 3x3 convolution in a bottleneck beside attention and MLP (arXiv:2207.07039).

    f(x) -> f(x) + s h(h(x A + a) * K + k) B + b

with x what attention or the MLP gets, behind its norm, A (d, r), K a convolution of 3x3 on the
map of the tokens with r channels in and out, B (r, d), and h(z) = z sigmoid(1.702 z). A class
token is a map of one position. In ConvNeXt the depthwise convolution takes the place of attention.

As in the authors' program A starts as Xavier's uniform, K at the identity, and B and the biases at
zero; s is chosen for each task there. It has a dropout of 0.1 before B; this has
none.
"""

import torch
import torch.nn.functional as F

from mmpeft.methods.base import Card, register
from mmpeft.methods.ranked import Ranked

from .base import BranchMethod
from .bottleneck import across_channels
from .maps import on_maps


@register
class Convpass(Ranked, BranchMethod):
    """A convolution in a bottleneck of ``rank`` r beside attention and MLP; ``scale`` is s."""

    card = Card(
        family='activations',
        formula='f(x) + s · (h(h(x A + a) ∗ K + k) B + b) beside attention and MLP',
        suits='Vision transformers with few images, where local structure helps.',
    )

    kinds = ('attention', 'mixer', 'mlp')
    needs_grid = True
    scale: float = 1.0

    def init(self, weight, point):
        rank, (out, width) = self.rank, point.shape
        bound = (6 / (width + rank)) ** 0.5
        kernel = weight.new_zeros(rank, rank, 3, 3)
        kernel[:, :, 1, 1] = torch.eye(rank)
        return {
            'down': weight.new_empty(rank, width).uniform_(-bound, bound),
            'down_bias': weight.new_zeros(rank),
            'kernel': kernel,
            'kernel_bias': weight.new_zeros(rank),
            'up': weight.new_zeros(out, rank),
            'up_bias': weight.new_zeros(out),
        }

    def branch(self, x, y, factors, point):
        x = x.to(factors['down'].dtype)
        inner = across_channels(x, factors['down'], factors['down_bias'], point.axis)

        def convolved(z):
            return F.conv2d(z, factors['kernel'], factors['kernel_bias'], padding=1)

        windows = 'attention' in point.kinds
        inner = on_maps(convolved, quick_gelu(inner), point.axis, point.grid, windows)
        inner = quick_gelu(inner)
        return self.scale * across_channels(inner, factors['up'], factors['up_bias'], point.axis)


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """An approximation of gelu."""
    return x * torch.sigmoid(1.702 * x)
