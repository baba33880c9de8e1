"""Products of maps with matrices, in the memory layout of the map.

Shapes: a map has its channels last, (..., C) as in a linear layer, or first,
(N, C, T) as in a contiguous feature map. T are the positions of an image,
O and I the channels of a matrix's output and input.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu import onednn
from .recompute import cast

# Whether a GPU's product in low precision can be given out in float32: torch 2.8 and later.
ROUNDS_LATER = hasattr(torch.ops.aten.mm, 'dtype')
# Elements of a part of a map that stays in a processor's cache.
CACHED = 2**17
# Positions of an image up to which one product of all images is faster than one an image.
FEW = 16


def is_low(x: Tensor) -> bool:
    """Whether a tensor has less than float32's precision."""
    return x.dtype.itemsize < 4


def takes_float(x: Tensor) -> bool:
    """Whether one product in float32 takes less time than two in a map's lower precision.

    On a CPU without units for them the latter are many times slower.
    """
    return x.is_cpu and not onednn.AMX


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b for x (..., I), W (O, I) with any strides and b (O,)."""
    if onednn.pays(x, weight):
        return onednn.linear(x, weight, bias)
    return F.linear(x, weight, bias)


def product(x: Tensor, other: Tensor, scale: float = 1.0) -> Tensor:
    """The product of two matrices, times a number."""
    if onednn.pays(x, other.T):
        return times_(onednn.linear(x, other.T), scale)
    if scale == 1:
        return x @ other
    return torch.addmm(x.new_empty(()), x, other, beta=0, alpha=scale)


def times(x: Tensor, scale: float) -> Tensor:
    """x times a number; x itself for 1."""
    return x if scale == 1 else x * scale


def times_(x: Tensor, scale: float) -> Tensor:
    """The same in the memory of x."""
    return x if scale == 1 else x.mul_(scale)


class ChannelsLast:
    """Maps (..., C)."""

    @staticmethod
    def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """A map (..., I) through a matrix (O, I), plus a bias (O,)."""
        return linear(x, weight, bias)

    @staticmethod
    def accumulate(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """y (..., O) + x (..., I) through (O, I), in the memory of y and rounded once."""
        y.view(-1, y.shape[-1]).addmm_(_rows(x), weight.T)
        return y

    @staticmethod
    def weight_grad(dy: Tensor, x: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The sum over positions of dy (..., O) times x (..., I): (O, I), in a dtype.

        It may be computed in ``out``.
        """
        dy, x = _rows(dy).T, _rows(x)
        if ROUNDS_LATER and dy.is_cuda and is_low(dy) and dtype == torch.float32:
            return torch.mm(dy, x, out_dtype=dtype)
        if onednn.pays(dy, x.T):
            return cast(onednn.weight_grad(dy, x.T), dtype)
        return cast(torch.mm(dy, x, out=_fitting(out, dy)), dtype)

    @staticmethod
    def dot(one: Tensor, other: Tensor, dtype: torch.dtype) -> Tensor:
        """The sum over positions of the product of two maps (..., C): (C,)."""
        one, other = _rows(one), _rows(other)
        rows = _cached(one)
        total = one.new_zeros(min(rows, len(one)), one.shape[1], dtype=dtype)
        for a, b in zip(one.split(rows), other.split(rows), strict=True):
            total[: len(a)].addcmul_(a, b)
        return total.sum(0)

    @staticmethod
    def bias_grad(dy: Tensor, dtype: torch.dtype) -> Tensor:
        """The sum over positions of dy (..., O): (O,), in a dtype."""
        return _rows(dy).sum(0, dtype=dtype)


class ChannelsFirst:
    """The same products of maps (N, C, T), whose positions are T of each of N images."""

    @staticmethod
    def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if _are_few(x):
            y = _images(linear(weight, _joined(x).T), len(x))
        elif onednn.pays(x, weight):
            return onednn.channels_first(x, weight, bias)
        else:
            y = torch.matmul(weight, x)
        return y if bias is None else y.add_(bias[:, None])

    @staticmethod
    def accumulate(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        if _are_few(x):
            return y.copy_(_images(torch.addmm(_joined(y), weight, _joined(x)), len(x)))
        return y.baddbmm_(weight.expand(len(x), -1, -1), x)

    @staticmethod
    def weight_grad(dy: Tensor, x: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        if not len(dy):
            return dy.new_zeros(dy.shape[1], x.shape[1], dtype=dtype)
        if _are_few(x):
            dy, x = _joined(dy)[None], _joined(x)[None]
        if onednn.pays(dy[0], x[0]):
            result = onednn.linear(dy[0], x[0])
        else:
            result = torch.mm(dy[0], x[0].T, out=_fitting(out, dy))
        for one, other in zip(dy[1:], x[1:], strict=True):
            result += linear(one, other)
        return cast(result, dtype)

    @staticmethod
    def dot(one: Tensor, other: Tensor, dtype: torch.dtype) -> Tensor:
        one, other, images = one.flatten(0, 1), other.flatten(0, 1), one.shape[:2]
        rows = _cached(one)
        pairs = zip(one.split(rows), other.split(rows), strict=True)
        return torch.cat([(a * b).sum(1, dtype=dtype) for a, b in pairs]).view(images).sum(0)

    @staticmethod
    def bias_grad(dy: Tensor, dtype: torch.dtype) -> Tensor:
        return dy.sum((0, 2), dtype=dtype)


def _are_few(x: Tensor) -> bool:
    return len(x) > 1 and x.shape[2] <= FEW


def _joined(x: Tensor) -> Tensor:
    """The positions of all images, (N, C, T) to (C, N T)."""
    return x.transpose(0, 1).reshape(x.shape[1], -1)


def _images(y: Tensor, count: int) -> Tensor:
    """(C, N T) to (N, C, T)."""
    return y.unflatten(1, (count, -1)).transpose(0, 1).contiguous()


def _fitting(out: Tensor | None, x: Tensor) -> Tensor | None:
    """Memory for a result of the dtype of x."""
    return out if out is not None and out.dtype == x.dtype else None


def _rows(x: Tensor) -> Tensor:
    """A map (..., C) as a matrix."""
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def _cached(x: Tensor) -> int:
    """As many rows as a processor's cache holds."""
    return max(1, CACHED // max(1, x.shape[1])) if x.device.type == 'cpu' else max(1, len(x))


Layout = type[ChannelsLast] | type[ChannelsFirst]


def layout_of(x: Tensor) -> Layout:
    """How a feature map (N, C, *size) lies in memory."""
    return ChannelsFirst if x.is_contiguous() else ChannelsLast


def flat(x: Tensor, layout: Layout) -> Tensor:
    """A feature map (N, C, *size) in the shape of a layout; a view if it is the map's layout."""
    return x.flatten(2) if layout is ChannelsFirst else x.movedim(1, -1)


def unflat(y: Tensor, layout: Layout, size: tuple[int, ...]) -> Tensor:
    """A map in the shape of a layout as a feature map (N, C, *size), a view."""
    return y.unflatten(2, size) if layout is ChannelsFirst else y.movedim(-1, 1)


def matmul_add(
    layout: Layout,
    x: Tensor,
    weight: Tensor,
    narrow: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """x W^T + n U^T + b for maps x (I channels) and n (r), W (O, I), U (O, r) and b (O,).

    In low precision the wide product comes last: the small one is not added to rounded numbers.
    """
    if is_low(x):
        return layout.accumulate(layout.matmul(narrow, up, bias), x, weight)
    return layout.accumulate(layout.matmul(x, weight, bias), narrow, up)
