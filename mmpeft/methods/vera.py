"""VeRA: vector-based random matrix adaptation (arXiv:2310.11454).

    dW = reshape(diag(b) B diag(d) A)           Eq. 2

B and A are random and frozen, the same for all weights that flatten to one
shape (peft cuts one large pair to each shape instead); b and d are trained for
each weight. b starts at zero, d at ``d_initial``. B and A are Kaiming uniform,
within sqrt(6 / columns) of each, which keeps the variance of dW independent of
the rank. They are drawn from ``seed`` and not stored.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .arguments import require
from .base import Card, Factors, register
from .matrix import MatrixMethod


def random_pair(rows: int, inner: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """The frozen matrices, equal on every machine and for every dtype of the weight.

    They come from numpy's legacy generator, whose stream never changes, and
    are rounded to float32. Seeds are below 2^32.

    Returns:
        B (rows, inner) and A (inner, columns). Not to be changed in place.
    """
    return tuple(map(torch.from_numpy, _drawn(rows, inner, columns, seed)))


# The cache serves the weights of one shape that follow each other in a network. It holds arrays,
# since tensors may be those of a mode, such as FakeTensorMode's.
@lru_cache(maxsize=8)
def _drawn(rows, inner, columns, seed):
    stream = np.random.RandomState([seed, rows, inner, columns])
    bounds = ((shape, np.sqrt(6 / shape[1])) for shape in ((rows, inner), (inner, columns)))
    return [stream.uniform(-bound, bound, shape).astype(np.float32) for shape, bound in bounds]


@register
class VeRA(MatrixMethod):
    """Two trained vectors around frozen random matrices.

    Attributes:
        rank: r; the paper's are 256 to 1024.
        d_initial: Start of every entry of d.
        seed: Of the frozen matrices, from 0 to 2^32 - 1.
    """

    card = Card(
        family='extension',
        formula='W + s · reshape(diag(b) B diag(d) A)',
        suits='The smallest adapter files: rows + rank numbers per weight.',
    )

    tied = ('vera_A', 'vera_B')

    rank: int = 256
    d_initial: float = 0.1
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        in_range = 0 <= self.seed < 2**32
        require(self, 'seed', in_range, 'must be an integer from 0 to 2^32 - 1.')
        rule = (
            'would leave b and d without a gradient for ever, since b starts at zero. Give it a '
            'value such as 0.1.'
        )
        require(self, 'd_initial', self.d_initial != 0, rule)

    def max_rank(self, spec):
        """Twice the largest mode: the paper takes 1024 at a width of 768."""
        return 2 * super().max_rank(spec)

    def tie_key(self, spec):
        return self.matrix_shape(spec)

    def init(self, weight, spec) -> Factors:
        rows, inner, _ = self.matrix_shape(spec)
        return {
            'vera_b': weight.new_zeros(rows),
            'vera_d': weight.new_full((inner,), self.d_initial),
        }

    def rebuilt(self, spec) -> Factors:
        up, down = random_pair(*self.matrix_shape(spec), self.seed)
        return {'vera_A': down, 'vera_B': up}

    def matrices(self, factors):
        up = factors['vera_b'][:, None] * factors['vera_B'] * factors['vera_d']
        return up, factors['vera_A']
