"""SHiRA: a few entries of each weight, at random or the largest (arXiv:2406.13175).

    W' = W, with ``values`` added to k entries of it

``mask`` chooses them: 'random', or 'magnitude' for the entries of the largest |W| (SHiRA-Rand and
-WM, Section 3.1). SHiRA-Grad, the entries of the largest gradients, is not here; FISH takes their
squares.
:mod:`.sparse` has what such methods share. An adapter changes 1 to 2 % of the weights, so that
several can be added to one base with little overlap.
"""

from typing import Literal

import torch

from .base import Card, register
from .sparse import SparseMethod


@register
class SHiRA(SparseMethod):
    """Random or large entries of each weight, trained themselves."""

    card = Card(
        family='reconstruction',
        formula='W + v at k fixed entries',
        suits='Adapters to switch quickly or add together, with high-rank updates.',
    )

    density: float = 0.01
    mask: Literal['random', 'magnitude'] = 'random'

    def scores(self, weight):
        if self.mask == 'magnitude':
            return weight.abs()
        return torch.rand(weight.shape, dtype=weight.dtype, device=weight.device)
