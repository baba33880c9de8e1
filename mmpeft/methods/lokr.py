"""LoKr: a Kronecker product with a low-rank block (arXiv:2309.14859).

    dW = C kron (B A)

Both channel modes of the stored weight are split in two, n = a b and m = c d
with a <= b and c <= d. C is (a, c), the second block (b, d, *kernel). Two
layouts treat a kernel:

``channel``  The block unfolded along its first mode: B is (b, r), A (r, the
             rest).
``tucker``   Keeps its axes: the block is T x_1 B x_2 A' with a core T of size
             (r, r, *kernel). A kernel of one element is a matrix.

The block is low rank only where that takes fewer parameters than the whole of
it, and so is C with ``decompose_both``; LyCORIS asks whether r is below half
of the larger side, which is the same for square blocks.

The start is LyCORIS': uniform as in linear layers (B of ``tucker`` as its
transpose would be), but zero for A, or the whole block. Factors that are a
single number start at 1. ``alpha / rank`` is applied once and to blocks of
every form (LyCORIS squares it when it merges, and leaves it out if C and the
block are whole).
"""

from math import isqrt, prod

import torch
from torch import Tensor

from .arguments import require
from .base import Card, Factors, register, uniform
from .loha import KernelRankMethod, low_rank
from .spec import WeightSpec


def split(size: int, factor: int = -1) -> tuple[int, int]:
    """(a, b) with a b = size and a <= b.

    ``factor`` is one of the two where it divides the size; otherwise a is the
    largest divisor that is no larger. -1 gives the two that are nearest to
    each other.
    """
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    limit = isqrt(size) if factor < 0 else min(factor, isqrt(size))
    small = next(divisor for divisor in range(limit, 0, -1) if size % divisor == 0)
    return small, size // small


def kron(first: Tensor, second: Tensor) -> Tensor:
    """Kronecker product of (a, c) and (b, d, *kernel): (a b, c d, *kernel)."""
    ones = (1,) * (second.ndim - 2)
    return torch.kron(first.view(*first.shape, *ones), second.contiguous())


@register
class LoKr(KernelRankMethod):
    """Kronecker product of a small matrix and a block of low rank r.

    Attributes:
        factor: Size of C's modes, by :func:`split`; -1 for C and the block as
            alike in size as the modes allow.
        decompose_both: Take C low rank too where that takes fewer parameters.
    """

    card = Card(
        family='extension',
        formula='W + s · C ⊗ (B A)',
        suits="Small adapter files: on wide layers a tenth of LoRA's at the same rank.",
    )

    factor: int = -1
    decompose_both: bool = False

    def __post_init__(self):
        super().__post_init__()
        rule = 'must be a positive integer, the size of C, or -1 for the split nearest to square.'
        require(self, 'factor', self.factor > 0 or self.factor == -1, rule)

    def sizes(self, spec: WeightSpec) -> tuple[tuple[int, int], tuple[int, int]]:
        """((a, c), (b, d)): sizes of C and of the block's channel modes."""
        (a, b), (c, d) = (split(size, self.factor) for size in spec.shape[:2])
        return (a, c), (b, d)

    def max_rank(self, spec):
        return max(self.sizes(spec)[1])

    def init(self, weight, spec) -> Factors:
        (a, c), (b, d) = self.sizes(spec)
        first = {'lokr_C': (a, c)}
        if self.decompose_both:
            first = smaller(first, {'lokr_C1': (a, self.rank), 'lokr_C2': (self.rank, c)})

        kernel = spec.kernel_size
        second = {'lokr_block': (b, d, *kernel)}
        if self.keeps_axes(spec):
            r, s = min(self.rank, b), min(self.rank, d)
            low = {'lokr_B': (b, r), 'lokr_A': (s, d), 'lokr_T': (r, s, *kernel)}
        else:
            low = {'lokr_B': (b, self.rank), 'lokr_A': (self.rank, d * prod(kernel))}
        second = smaller(second, low)

        factors = {
            name: uniform(weight, *shape) if prod(shape) > 1 else weight.new_ones(shape)
            for name, shape in (first | second).items()
        }
        if 'lokr_T' in second:  # LyCORIS stores this B transposed
            factors['lokr_B'] = uniform(weight, *reversed(second['lokr_B'])).mT.contiguous()
        zero = 'lokr_A' if 'lokr_A' in second else 'lokr_block'
        return factors | {zero: torch.zeros_like(factors[zero])}

    def delta(self, factors, spec) -> Tensor:
        first = factors.get('lokr_C')
        if first is None:
            first = low_rank(factors['lokr_C1'], factors['lokr_C2'])
        second = factors.get('lokr_block')
        if second is None:
            second = low_rank(factors['lokr_B'], factors['lokr_A'], factors.get('lokr_T'))
        _, block = self.sizes(spec)
        return kron(first, second.view(*block, *spec.kernel_size))


def smaller(whole: dict[str, tuple], low: dict[str, tuple]) -> dict[str, tuple]:
    """Of two forms of a block, each as shapes by name, the low-rank one if it has fewer numbers."""
    size, low_size = (sum(map(prod, shapes.values())) for shapes in (whole, low))
    return low if low_size < size else whole
