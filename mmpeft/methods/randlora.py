"""RandLoRA: a full-rank update of random bases (arXiv:2502.00987).

    dW = reshape(sum_j B_j L_j A G_j),   j = 1, ..., ceil(min(n, m) / r)            Eq. 4

for a weight unfolded along its first mode to (n, m) with n >= m, and its transpose otherwise. A
(r, m) and the B_j (n, r) are random and frozen, the same for all weights that unfold to one shape
(peft cuts one large pair to each shape instead, and pairs rows and columns in another order); the
diagonals L_j (r) and G_j (m) train. L starts at zero and G at 1 / m. A and B are uniform with a
standard deviation of 1; they are drawn from ``seed`` and not stored. s is 20, peft's 640 / 32.

The smaller r, the more parameters train. The update has full rank, and so no thin form.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .arguments import require
from .base import Card, Factors, register
from .delta import DeltaMethod
from .ranked import Ranked
from .spec import WeightSpec


def random_bases(large: int, small: int, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """The frozen matrices in float32, equal on every machine.

    They come from numpy's legacy generator, whose stream never changes. Seeds are below 2^32.

    Returns:
        B (large, bases, rank) and A (rank, small). Not to be changed in place.
    """
    return tuple(map(torch.from_numpy, _drawn(large, small, rank, seed)))


# As in VeRA.
@lru_cache(maxsize=8)
def _drawn(large, small, rank, seed):
    stream = np.random.RandomState([seed, large, small, rank])
    shapes = (large, -(-small // rank), rank), (rank, small)
    return [stream.uniform(-(3**0.5), 3**0.5, shape).astype(np.float32) for shape in shapes]


@register
class RandLoRA(Ranked, DeltaMethod):
    """Trained diagonals around frozen random matrices of ``rank`` r.

    Attributes:
        seed: Of the frozen matrices, from 0 to 2^32 - 1.
    """

    card = Card(
        family='extension',
        formula='W + s · Σⱼ Bⱼ Λⱼ A Γⱼ',
        suits='Updates of full rank at the parameters of a low-rank one; takes more time per step.',
    )

    default_scale = 20.0
    grows = False
    tied = ('bases_A', 'bases_B')

    rank: int = 32
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        in_range = 0 <= self.seed < 2**32
        require(self, 'seed', in_range, 'must be an integer from 0 to 2^32 - 1.')

    def sizes(self, spec: WeightSpec) -> tuple[int, int]:
        """Larger and smaller side of the unfolded weight."""
        rows = spec.shape[0]
        return max(rows, spec.numel // rows), min(rows, spec.numel // rows)

    def tie_key(self, spec):
        return self.sizes(spec)

    def init(self, weight, spec) -> Factors:
        _, small = self.sizes(spec)
        count = -(-small // self.rank)
        return {
            'diagonal_r': weight.new_zeros(count, self.rank),
            'diagonal_m': weight.new_full((count, small), 1 / small),
        }

    def rebuilt(self, spec) -> Factors:
        up, down = random_bases(*self.sizes(spec), self.rank, self.seed)
        return {'bases_A': down, 'bases_B': up}

    def delta(self, factors, spec):
        scaled = factors['diagonal_r'][:, :, None] * factors['bases_A']
        scaled = scaled * factors['diagonal_m'][:, None]
        product = factors['bases_B'].flatten(1) @ scaled.flatten(0, 1)
        wide = spec.shape[0] < spec.numel // spec.shape[0]
        return (product.T if wide else product).reshape(spec.shape)
