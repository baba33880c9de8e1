"""Parallel adapters: a bottleneck beside a layer, or beside an MLP (arXiv:2110.04366).

    x W -> x W + s h(x A) B              Subspace tuning, Eq. 25 and 26

with A (n, r), B (r, m) and no biases. A starts uniform as a linear layer's, B
at zero. Beside a convolution A is a convolution of the layer's kernel, stride,
padding, dilation and groups with r channels (a depthwise one makes a map r
times as large), and B is 1x1; beside a transposed
convolution A is 1x1 and B has the kernel. All groups of a layer share the factor
with the kernel, and each has r channels of its own in between.

Without h this is LoRA of the ``channel`` layout, with as many parameters. With
h it is LoRA with MPC_n, the non-linearity between LoRA's factors (Subspace
tuning, Sec. 4.2).

The scaled one is beside the whole MLP, with s = 4: the second half of the
paper's MAM adapter. The authors' program has biases there; the paper's formula
and this method do not.
"""

import torch.nn.functional as F
from torch import Tensor

from mmpeft.errors import UsageError
from mmpeft.methods.base import Card, Factors, Method, register, uniform
from mmpeft.methods.ranked import Ranked
from mmpeft.methods.spec import ConvGeometry, InsertionPoint

from .base import BranchMethod
from .bottleneck import ACTIVATIONS, Activation, across_channels

TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def factor_shapes(point: InsertionPoint, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of A and B as they are stored; each sums over all axes but the first.

    (r, in / groups, *kernel) and (out, r); beside a transposed convolution
    (groups r, in / groups) and (r, out / groups, *kernel).
    """
    layer = point.layer
    if layer is None:
        return (rank, point.in_features), (point.out_features, rank)
    rest = tuple(layer.shape[1:])
    if layer.transposed:
        return (layer.groups * rank, layer.in_features // layer.groups), (rank, *rest)
    return (rank, *rest), (layer.out_features, rank)


def convolve_transposed(
    x: Tensor, weight: Tensor, geometry: ConvGeometry, groups: int, size: tuple[int, ...]
) -> Tensor:
    """A transposed convolution of a map, with or without a batch, to a given size.

    The weight is (in, out / groups, *kernel). Strides leave the size open.
    """
    axes, kernel = weight.ndim - 2, weight.shape[2:]
    stride, padding, dilation = geometry.stride, geometry.zeros, geometry.dilation
    sizes = zip(size, x.shape[-axes:], kernel, stride, padding, dilation, strict=True)
    missing = [n - ((m - 1) * s - 2 * p + d * (k - 1) + 1) for n, m, k, s, p, d in sizes]
    return TRANSPOSED[axes](x, weight, None, stride, padding, missing, groups, dilation)


def for_all_groups(weight: Tensor, groups: int) -> Tensor:
    """A kernel repeated along its first axis."""
    return weight.repeat(groups, *(1,) * (weight.ndim - 1))


def check_size(method: Method, added: Tensor, y: Tensor, point: InsertionPoint) -> None:
    """Raise UsageError unless a branch beside a convolution has the shape of its output."""
    if added.shape != y.shape:
        raise UsageError(
            f'{type(method).__name__}: a convolution of kernel {point.layer.kernel_size} returned '
            f'{tuple(y.shape)}, where its stride, padding and dilation give {tuple(added.shape)}. '
            'It pads its input itself; leave such layers out with targets.exclude.'
        )


@register
class ParallelAdapter(Ranked, BranchMethod):
    """A bottleneck of ``rank`` r beside each linear layer and convolution.

    ``activation`` is h, ``scale`` s.
    """

    card = Card(
        family='activations',
        formula='x W + s · h(x A) B',
        suits='LoRA with a non-linearity between its factors, with as many parameters.',
    )

    kinds = ('layer',)
    activation: Activation = 'relu'
    scale: float = 1.0

    def init(self, weight, point) -> Factors:
        down, up = factor_shapes(point, self.rank)
        return {'down': uniform(weight, *down), 'up': weight.new_zeros(up)}

    def branch(self, x, y, factors, point):
        down, up, layer, geometry = factors['down'], factors['up'], point.layer, point.geometry
        x, activation = x.to(down.dtype), ACTIVATIONS[self.activation]
        if geometry is None:
            inner = activation(across_channels(x, down, None, point.axis))
            return self.scale * across_channels(inner, up, None, point.axis)
        groups, axes = layer.groups, len(layer.kernel_size)
        if layer.transposed:
            inner = activation(across_channels(x, down, None, -1 - axes, groups))
            up = for_all_groups(up, groups)
            added = convolve_transposed(inner, up, geometry, groups, y.shape[-axes:])
        else:
            down = for_all_groups(down, groups)
            inner = activation(geometry.convolve(x, down, groups=groups))
            added = across_channels(inner, up, None, -1 - axes, groups)
        check_size(self, added, y, point)
        return self.scale * added


@register
class ScaledParallelAdapter(ParallelAdapter):
    """A scaled bottleneck beside each MLP."""

    card = Card(
        family='activations',
        formula='MLP(x) + s · h(x A) B',
        suits='Transformers and ConvNeXt with room for a rank of 64 and more.',
    )

    kinds = ('mlp',)
    scale: float = 4.0
