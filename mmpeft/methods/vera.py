"""VeRA: vector-based random matrix adaptation (arXiv:2310.11454).

    dW = reshape(diag(b) B diag(d) A)

B and A are random and frozen, the same for all weights that flatten to one
shape; b and d are trained for each weight. b starts at zero and d at
``d_initial``. B and A are Kaiming uniform, within sqrt(6 / columns) of each,
which keeps the variance of dW independent of the rank. They are drawn from
``seed`` whenever a model is adapted, and neither trained nor stored.

Kernels are flattened as in LoRA. ``channel`` is the default here, for it keeps
b one number a stored row; ``loralib`` multiplies the rank by the kernel's size,
and VeRA's ranks are large. The paper's matrices are shared by layers of one
shape, as here; peft cuts one large pair to the shape of each layer instead.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from mmpeft.errors import UsageError
from mmpeft.registry import METHODS

from .base import Card, Factors, check_choice
from .lora import matrix_shape
from .ranked import RankMethod


# Kept for the weights of one shape that follow each other in a network.
@lru_cache(maxsize=8)
def random_pair(rows: int, inner: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """The frozen matrices, equal on every machine and for every dtype of the weight.

    They come from numpy's legacy generator, whose stream never changes, and
    are rounded to float32.

    Args:
        rows: Of the flattened weight.
        inner: Rank of the product.
        columns: Of the flattened weight.
        seed: Below 2^32.

    Returns:
        B (rows, inner) and A (inner, columns). Not to be changed in place.
    """
    stream = np.random.RandomState([seed, rows, inner, columns])

    def kaiming(*shape):
        bound = np.sqrt(6 / shape[1])
        return torch.from_numpy(stream.uniform(-bound, bound, shape).astype(np.float32))

    return kaiming(rows, inner), kaiming(inner, columns)


@METHODS.register_module()
@dataclass(frozen=True, kw_only=True)
class VeRA(RankMethod):
    """Two trained vectors around frozen random matrices.

    Attributes:
        rank: r; the paper's are 256 to 1024.
        d_initial: Start of every entry of d.
        seed: Of the frozen matrices, from 0 to 2^32 - 1.
        layout: How kernels become matrices, ``'loralib'`` or ``'channel'``
            (:mod:`.lora`).
    """

    card: ClassVar = Card(
        family='extension',
        formula='W + reshape(diag(b) B diag(d) A)',
        trains='vectors b (zero), d (0.1); B, A frozen and random',
        paper='VeRA, Eq. 2 (arXiv:2310.11454)',
        cost='One product of a large rank to build the update; B and A take memory.',
        suits='The smallest adapter files: rows + rank numbers a weight.',
    )

    shared: ClassVar = ('vera_A', 'vera_B')

    rank: int = 256
    d_initial: float = 0.1
    seed: int = 0
    layout: str = 'channel'

    def __post_init__(self):
        super().__post_init__()
        check_choice(self, 'layout', ('loralib', 'channel'))
        if not isinstance(self.rank, int):
            raise UsageError(f'VeRA: rank={self.rank!r} must be one integer.')
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise UsageError(f'VeRA: seed={self.seed!r} must be an integer from 0 to 2^32 - 1.')
        if not self.d_initial:
            raise UsageError(
                'VeRA: d_initial=0 would leave b and d without a gradient for ever, since b starts '
                'at zero. Give it a value such as 0.1.'
            )

    def max_rank(self, spec):
        """Twice the largest mode: the paper takes 1024 at a width of 768."""
        return 2 * super().max_rank(spec)

    def share_key(self, spec):
        return matrix_shape(spec, self.rank, self.layout)

    def init(self, weight, spec) -> Factors:
        rows, inner, _ = self.share_key(spec)
        return {
            'vera_b': weight.new_zeros(rows),
            'vera_d': weight.new_full((inner,), self.d_initial),
        }

    def rebuilt(self, spec) -> Factors:
        up, down = random_pair(*self.share_key(spec), self.seed)
        return {'vera_A': down, 'vera_B': up}

    def delta(self, factors, spec) -> Tensor:
        product = torch.mm(factors['vera_B'] * factors['vera_d'], factors['vera_A'])
        return (factors['vera_b'][:, None] * product).view(spec.shape)

    def low_rank(self, factors, spec):
        if not spec.is_matrix:
            return None
        up = factors['vera_b'][:, None] * factors['vera_B'] * factors['vera_d']
        return up, None, factors['vera_A']
