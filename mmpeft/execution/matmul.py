"""Products of maps with matrices, in the layout in which a map comes.

A map holds its tokens in rows, (..., I) as in a linear layer, or in columns,
(N, I, T) as in a contiguous feature map. On a CPU, products in float32 go
through oneDNN where torch has it: torch's own go to MKL, which does not use
all of the vector units of processors of other makers.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# Multiply-adds below which oneDNN's preparation takes longer than the product.
SMALL_PRODUCT = 2**21
# Columns up to which it computes a product faster transposed.
THIN = 128


def is_low(x: Tensor) -> bool:
    """Whether a tensor has less than float32's precision."""
    return x.dtype.itemsize < 4


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b for x (..., I) and W (O, I), both with any strides."""
    if not _has_onednn(x, weight):
        return torch.nn.functional.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'none', [], '')


class Rows:
    """Tokens in rows, (..., I)."""

    @staticmethod
    def times(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """A map through a matrix (O, I)."""
        return linear(x, weight, bias)

    @staticmethod
    def accumulate(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """y + x W^T; ``y`` is used up. The sum is rounded once."""
        return y.view(-1, y.shape[-1]).addmm_(x.flatten(0, -2), weight.T).view(y.shape)

    @staticmethod
    def outer(left: Tensor, right: Tensor) -> Tensor:
        """The sum over tokens of left right^T, (O, I)."""
        left, right = left.flatten(0, -2).T, right.flatten(0, -2).T
        is_thin = len(right) <= THIN or left.shape[1] >= len(left)
        if len(right) < len(left) and is_thin:
            return linear(right, left).T
        return linear(left, right)

    @staticmethod
    def total(dy: Tensor) -> Tensor:
        """The sum over tokens: the gradient of a bias."""
        return dy.flatten(0, -2).sum(0)

    @staticmethod
    def tokens(x: Tensor) -> int:
        """How many there are."""
        return x.numel() // x.shape[-1]


class Columns:
    """Tokens in columns, (N, I, T)."""

    @staticmethod
    def times(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """A map through a matrix (O, I)."""
        if len(x) == 1 and bias is None:
            return _image(x[0], weight)[None]
        if _has_onednn(x, weight):
            # oneDNN reads a transposed matrix several times slower.
            if weight.is_contiguous():
                return torch.nn.functional.conv1d(x, weight.unsqueeze(2), bias)
            return torch.nn.functional.conv_transpose1d(x, weight.T.unsqueeze(2), bias)
        y = torch.matmul(weight, x)
        return y if bias is None else y.add_(bias[:, None])

    @staticmethod
    def accumulate(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """y + W x; ``y`` is used up. The sum is rounded once."""
        return y.baddbmm_(weight.expand(len(x), -1, -1), x)

    @staticmethod
    def outer(left: Tensor, right: Tensor) -> Tensor:
        """The sum over tokens of left right^T, (O, I)."""
        result = linear(left[0], right[0])
        for one, other in zip(left[1:], right[1:], strict=True):
            result += linear(one, other)
        return result

    @staticmethod
    def total(dy: Tensor) -> Tensor:
        """The sum over tokens: the gradient of a bias."""
        return dy.sum((0, 2))

    @staticmethod
    def tokens(x: Tensor) -> int:
        """How many there are."""
        return len(x) * x.shape[2]


def _image(x, weight):
    """One image's (I, T) through a matrix (O, I), whichever is the lesser to transpose."""
    tokens_are_few = x.shape[1] * sum(weight.shape) < weight.numel()
    if tokens_are_few and not weight.is_contiguous():
        return linear(x.T, weight).T.contiguous()
    return linear(weight, x.T)


Layout = type[Rows] | type[Columns]


def layout_of(x: Tensor) -> Layout:
    """How a feature map (N, C, *) lies in memory."""
    return Columns if x.is_contiguous() else Rows


def as_tokens(x: Tensor, layout: Layout) -> Tensor:
    """A feature map (N, C, *) as tokens, a view where the layout is the map's own."""
    return x.flatten(2) if layout is Columns else x.movedim(1, -1)


def as_map(y: Tensor, layout: Layout, size: tuple[int, ...]) -> Tensor:
    """Tokens as a feature map (N, C, *size)."""
    return y.unflatten(2, size) if layout is Columns else y.movedim(-1, 1)


def together(
    layout: Layout,
    x: Tensor,
    weight: Tensor,
    narrow: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """x W^T + n U^T + b, of a wide and a thin product.

    In low precision the wide one comes last, so that the small sum is not
    added to numbers that are rounded already.
    """
    if is_low(x):
        return layout.accumulate(layout.times(narrow, up, bias), x, weight)
    return layout.accumulate(layout.times(x, weight, bias), narrow, up)


def as_output(y: Tensor) -> Tensor:
    """The same content, for a Function to return: no view, which activations in place forbid."""
    return torch.ops.aten._unsafe_view(y, y.shape)


def changes_of(y: Tensor) -> Callable[[], bool]:
    """Tells later whether a tensor was changed in place since, without holding its memory."""
    counter, before = y.detach(), y._version
    counter.data = y.new_empty(0)
    return lambda: counter._version != before


def _has_onednn(x, weight):
    return (
        x.device.type == 'cpu'
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * len(weight) >= SMALL_PRODUCT
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, '_linear_pointwise')
    )
