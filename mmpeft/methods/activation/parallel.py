"""Parallel adapters: a bottleneck beside a layer, or beside an mlp (arXiv:2110.04366).

    x W -> x W + s h(x A) B              Subspace tuning, Eq. 25 and 26

with A (n, r), B (r, m) and no biases. A starts uniform as a linear layer's, B
at zero. Beside a convolution A is one too, of the layer's kernel, stride,
padding, dilation and groups, with r channels, and B is 1x1; beside a transposed
convolution A is 1x1 and B has the kernel. Groups share the factor with the
kernel, and each has its own r channels in between. No kernel is flattened.

Without h this is LoRA of the ``channel`` layout, with as many parameters. With
it, it is LoRA with MPC_n, the non-linearity between LoRA's factors (Subspace
tuning, Sec. 4.2).

The scaled one is beside the mlp as a whole, with s = 4: the second half of the
paper's MAM adapter. The authors' program has biases there; the paper's formula
has none, nor has this.
"""

from dataclasses import dataclass
from math import prod, sqrt
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from mmpeft.errors import UsageError
from mmpeft.methods.base import Card, Factors
from mmpeft.methods.ranked import Ranked
from mmpeft.methods.spec import ConvGeometry, InsertionPoint
from mmpeft.registry import METHODS

from .base import BranchMethod
from .bottleneck import ACTIVATIONS, Activation, across_channels

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def factor_shapes(place: InsertionPoint, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of A and B as they are stored, the axis that each sums over behind the first.

    Args:
        place: A layer, or a module that is none.
        rank: r.

    Returns:
        (r, in / groups, *kernel) and (out, r); beside a transposed convolution
        (groups r, in / groups) and (r, out / groups, *kernel).
    """
    layer = place.layer
    if layer is None:
        return (rank, place.in_features), (place.out_features, rank)
    rest = tuple(layer.shape[1:])
    if layer.transposed:
        inner = layer.groups * rank
        return (inner, layer.in_features // layer.groups), (rank, *rest)
    return (rank, *rest), (layer.out_features, rank)


def convolve(x: Tensor, weight: Tensor, window: ConvGeometry, groups: int) -> Tensor:
    """A convolution with a layer's window and one kernel for all groups.

    Args:
        x: (N, in, *size) or (in, *size).
        weight: (r, in / groups, *kernel).
        window: Of the layer.
        groups: Of the layer.

    Returns:
        (N, groups r, *size), or without N.
    """
    padding = [before for before, _ in window.padding]
    if window.padding_mode != 'zeros' or any(a != b for a, b in window.padding):
        sides = [side for pair in reversed(window.padding) for side in pair]
        mode = 'constant' if window.padding_mode == 'zeros' else window.padding_mode
        x, padding = F.pad(x, sides, mode), 0
    weight = weight.repeat(groups, *(1,) * (weight.ndim - 1))
    function = CONVOLUTIONS[weight.ndim - 2]
    return function(x, weight, None, window.stride, padding, window.dilation, groups)


def convolve_transposed(
    x: Tensor, weight: Tensor, window: ConvGeometry, groups: int, size: tuple[int, ...]
) -> Tensor:
    """The same of a transposed convolution.

    Args:
        x: (N, groups r, *size) or (groups r, *size).
        weight: (r, out / groups, *kernel).
        window: Of the layer.
        groups: Of the layer.
        size: Of the result, which the layer's strides leave open.

    Returns:
        (N, out, *size), or without N.
    """
    axes = weight.ndim - 2
    padding = [before for before, _ in window.padding]
    least = [
        (n - 1) * s - 2 * p + d * (k - 1) + 1
        for n, s, p, d, k in zip(
            x.shape[-axes:], window.stride, padding, window.dilation, weight.shape[2:], strict=True
        )
    ]
    missing = [n - m for n, m in zip(size, least, strict=True)]
    weight = weight.repeat(groups, *(1,) * (weight.ndim - 1))
    return TRANSPOSED[axes](
        x, weight, None, window.stride, padding, missing, groups, window.dilation
    )


def across_groups(x: Tensor, weight: Tensor, groups: int, axes: int) -> Tensor:
    """A 1x1 convolution within groups.

    Args:
        x: (N, m, *size) or (m, *size).
        weight: (n, m / groups).
        groups: That n and m are divided into.
        axes: Of ``size``.

    Returns:
        ``x`` with n channels.
    """
    return CONVOLUTIONS[axes](x, weight.view(*weight.shape, *(1,) * axes), groups=groups)


@METHODS.register_module()
@dataclass(frozen=True, kw_only=True)
class ParallelAdapter(Ranked, BranchMethod):
    """A bottleneck beside each linear layer and convolution.

    Attributes:
        rank: r; an adapter has as many parameters as LoRA's of the
            ``channel`` layout.
        activation: h: ``'gelu'``, ``'relu'``, ``'swish'`` or ``'identity'``.
        scale: s.
    """

    card: ClassVar = Card(
        family='activations',
        formula='x W + s · h(x A) B',
        trains='A (uniform), B (zero)',
        paper='He et al. (arXiv:2110.04366); Subspace tuning, Eq. 25, and LoRA + MPC_n, Sec. 4.2',
        cost='A thin layer beside each layer, in inference too; r times the map if depthwise.',
        suits='LoRA with a non-linearity between its factors, at as many parameters.',
    )

    kinds: ClassVar = ('layer',)
    activation: Activation = 'relu'
    scale: float = 1.0

    def init(self, weight, place) -> Factors:
        down, up = factor_shapes(place, self.rank)
        bound = 1 / sqrt(prod(down[1:]))
        return {
            'down': weight.new_empty(down).uniform_(-bound, bound),
            'up': weight.new_zeros(up),
        }

    def branch(self, x, y, factors, place):
        down, up, spec = factors['down'], factors['up'], place.layer
        x, activation = x.to(down.dtype), ACTIVATIONS[self.activation]
        if place.window is None:
            inner = activation(across_channels(x, down, None, place.axis))
            return self.scale * across_channels(inner, up, None, place.axis)
        axes = len(spec.kernel_size)
        if spec.transposed:
            inner = activation(across_groups(x, down, spec.groups, axes))
            added = convolve_transposed(inner, up, place.window, spec.groups, y.shape[-axes:])
        else:
            inner = activation(convolve(x, down, place.window, spec.groups))
            added = across_groups(inner, up, spec.groups, axes)
        if added.shape != y.shape:
            raise UsageError(
                f'{type(self).__name__}: a convolution of kernel {spec.kernel_size} returned '
                f'{tuple(y.shape)}, where its stride, padding and dilation make '
                f'{tuple(added.shape)} of its input. It pads in a way of its own: leave such '
                'layers out with targets.exclude.'
            )
        return self.scale * added


@METHODS.register_module()
@dataclass(frozen=True, kw_only=True)
class ScaledParallelAdapter(ParallelAdapter):
    """A scaled bottleneck beside each mlp."""

    card: ClassVar = Card(
        family='activations',
        formula='mlp(x) + s · h(x A) B',
        trains='A (uniform), B (zero)',
        paper='He et al., scaled PA (arXiv:2110.04366); Subspace tuning, Eq. 25',
        cost='Two small products beside each mlp, in inference too.',
        suits='Transformers and ConvNeXt with room for a rank of 64 and more.',
    )

    kinds: ClassVar = ('mlp',)
    scale: float = 4.0
