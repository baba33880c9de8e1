"""SAM-PARSER and SVDiff: the singular values train (arXiv:2308.14604, arXiv:2303.11305).

    W' = U (S + D) V^T                                           SAM-PARSER
       = W + U D V^T                            Subspace tuning, Eq. 4
    W' = U relu(S + D) V^T                                       SVDiff
       = W + U max(D, -S) V^T                   Subspace tuning, Eq. 34 and 35

for the thin SVD W = U S V^T of the pretrained weight, taken once. The
diagonal D starts at zero. Kernels are unfolded along the first mode of the
stored weight, as SVDiff does.

U and V are stored with the adapter: another machine's SVD may differ in signs
and, where singular values coincide, in directions. For all singular values
they hold more numbers than the weight; ``rank`` keeps the leading ones alone,
which the papers do not do.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from mmpeft.errors import UsageError
from mmpeft.registry import METHODS

from .base import Card, Factors
from .decomposition import channel_matrix, leading
from .delta import DeltaMethod

COST = (
    'One product with min(n, m) columns. The file holds min(n, m) · (n + m) fixed numbers for a '
    'weight of n · m; with rank k, k · (n + m).'
)


@METHODS.register_module()
@dataclass(frozen=True, kw_only=True)
class SAMPARSER(DeltaMethod):
    """A trained shift of each singular value.

    Attributes:
        rank: Number k of leading singular values that train, at most
            min(n, m) of a weight that unfolds to (n, m); None for all. An
            adapter file holds k (n + m) fixed numbers a weight.
    """

    card: ClassVar = Card(
        family='reconstruction',
        formula='U (Σ + D) Vᵀ',
        trains='shift D of each singular value (zero)',
        paper='SAM-PARSER (arXiv:2308.14604); Subspace tuning, Eq. 4',
        cost=COST,
        suits='Comparison: the weakest published, as its directions stay the pretrained ones.',
    )

    rank: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.rank is not None and (not isinstance(self.rank, int) or self.rank < 1):
            raise UsageError(
                f'{type(self).__name__}: rank={self.rank!r} must be a positive integer, the number '
                'of leading singular values that train, or None for all of them.'
            )

    def init(self, weight, spec) -> Factors:
        matrix = channel_matrix(weight, spec)
        rank = min(self.rank or weight.numel(), *matrix.shape)
        left, values, right = leading(matrix, rank)
        return {
            'shift': torch.zeros_like(values),
            'left': nn.Buffer(left),
            'values': nn.Buffer(values),
            'right': nn.Buffer(right),
        }

    def delta(self, factors, spec):
        return _reshaped(factors['shift'], factors, spec)


@METHODS.register_module()
@dataclass(frozen=True, kw_only=True)
class SVDiff(SAMPARSER):
    """A trained shift of each singular value, which stays at zero or above.

    Attributes:
        rank: As in :class:`SAMPARSER`.
    """

    card: ClassVar = Card(
        family='combination',
        formula='U relu(Σ + D) Vᵀ',
        trains='spectral shift D (zero)',
        paper='SVDiff (arXiv:2303.11305); Subspace tuning, Eq. 34 and 35',
        cost=COST,
        suits='Few examples: the directions of the pretrained weight are kept.',
    )

    def delta(self, factors, spec):
        return _reshaped(torch.maximum(factors['shift'], -factors['values']), factors, spec)


def _reshaped(diagonal, factors, spec):
    return torch.mm(factors['left'] * diagonal, factors['right']).view(spec.shape)
