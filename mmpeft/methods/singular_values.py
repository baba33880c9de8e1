"""SAM-PARSER and SVDiff: the singular values train (arXiv:2308.14604, arXiv:2303.11305).

    W' = U (S + s D) V^T                                         SAM-PARSER
       = W + s U D V^T                          Subspace tuning, Eq. 4
    W' = U relu(S + s D) V^T                                     SVDiff
       = W + s U max(D, -S / s) V^T             Subspace tuning, Eq. 34 and 35

for the thin SVD W = U S V^T of the pretrained weight, unfolded along its first
mode; the papers have s = 1. The diagonal D starts at zero. U and V are stored
with the adapter, since another machine's SVD may differ in signs and, where
singular values coincide, in directions. ``rank`` keeps the leading ones alone,
which the papers do not do.
"""

import torch
from torch import Tensor

from .arguments import require
from .base import Card, Factors, register
from .decomposition import stored_triplets
from .delta import DeltaMethod


@register
class SAMPARSER(DeltaMethod):
    """A trained shift of each singular value.

    Attributes:
        rank: Number k of leading singular values that train, all if None. An
            adapter file holds k (n + m + 1) fixed numbers of a weight that
            unfolds to (n, m), in which k is at most min(n, m).
    """

    card = Card(
        family='reconstruction',
        formula='U (Σ + s · D) Vᵀ',
        suits='Comparison: the weakest of the published methods, because it keeps the pretrained '
        'directions.',
    )

    rank: int | None = None

    def __post_init__(self):
        super().__post_init__()
        rule = 'must be the number of leading singular values that train, or None for all.'
        require(self, 'rank', self.rank is None or self.rank > 0, rule)

    def init(self, weight, spec) -> Factors:
        triplets = stored_triplets(weight, self.rank)
        return {'shift': torch.zeros_like(triplets['values'])} | triplets

    def diagonal(self, factors: Factors) -> Tensor:
        """The change of the singular values before scaling, (k,)."""
        return factors['shift']

    def delta(self, factors, spec):
        scaled = factors['left'] * self.diagonal(factors)
        return torch.mm(scaled, factors['right']).view(spec.shape)

    def low_rank(self, factors, spec):
        scaled, right = factors['left'] * self.diagonal(factors), factors['right']
        if spec.is_matrix:
            return scaled, None, right
        return (scaled, right.view(-1, *spec.shape[1:]), None) if spec.is_plain else None


@register
class SVDiff(SAMPARSER):
    """A trained shift of each singular value, which stays at zero or above."""

    card = Card(
        family='combination',
        formula='U relu(Σ + s · D) Vᵀ',
        suits='Few examples: it keeps the directions of the pretrained weight.',
    )

    def __post_init__(self):
        super().__post_init__()
        rule = 'must be positive: singular values are compared with -s · D.'
        require(self, 'scale', self.scaling > 0, rule)

    def diagonal(self, factors):
        return torch.maximum(factors['shift'], -factors['values'] / self.scaling)
