"""Spectral Adapter: the top singular vectors train (arXiv:2405.13952).

    W' = [U_r + A, U_rest] S [V_r + B, V_rest]^T            Subspace tuning, Eq. 32
       = W + A S_r V_r^T + U_r S_r B^T + A S_r B^T          Eq. 33

for the r largest singular triplets of the pretrained weight, unfolded along
its first mode. A and B start at zero; a file holds the triplets too. This is
the paper's additive variant.
"""

import torch

from .base import Card, Factors, register
from .decomposition import stored_triplets
from .delta import DeltaMethod
from .ranked import Ranked


@register
class SpectralAdapter(Ranked, DeltaMethod):
    """Trained shifts of the top singular vectors, r capped by the smaller side of the matrix."""

    card = Card(
        family='combination',
        formula='[Uᵣ + A, U₋ᵣ] Σ [Vᵣ + B, V₋ᵣ]ᵀ',
        suits='Adapters that stay close to the pretrained spectrum.',
    )

    def max_rank(self, spec):
        return min(spec.shape[0], spec.numel // spec.shape[0])

    def init(self, weight, spec) -> Factors:
        triplets = stored_triplets(weight, self.rank)
        return {
            'shift_left': torch.zeros_like(triplets['left']),
            'shift_right': torch.zeros_like(triplets['right']),
        } | triplets

    def delta(self, factors, spec):
        values, right = factors['values'], factors['right'] + factors['shift_right']
        shifted = torch.mm(factors['shift_left'] * values, right)
        return shifted.addmm(factors['left'] * values, factors['shift_right']).view(spec.shape)
