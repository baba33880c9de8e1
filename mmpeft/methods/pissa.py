"""PiSSA and MiLoRA: LoRA that starts at singular triplets (arXiv:2404.02948, arXiv:2406.09044).

    W' = (W - s B0 A0) + s B A          the papers' form: residual and adapter
       = W + s (B A - B0 A0)            dW = B A - B0 A0

    s B0 A0 = U_r S_r V_r^T,   B0 = U_r (S_r / s)^1/2,   A0 = (S_r / s)^1/2 V_r^T

PiSSA takes the r largest singular values of the pretrained weight, MiLoRA the
r smallest, once. The second form leaves the base as it is and starts at W to
the last bit; with ``update='lie'`` it is the dW that LieRA applies.

What is trained are the differences of A and B from A0 and B0. Without weight
decay, as in PiSSA's paper, this is the same; with it, A and B are drawn to the
pretrained weight, where the papers' form would draw a part of W to zero. A
file holds A0 and B0 beside them.

In the ``loralib`` layout a kernel is the matrix that :mod:`.matrix` makes of
it, whose singular triplets mean little.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .arguments import require
from .base import Card, Factors, register
from .decomposition import Triplets, leading, trailing
from .lora import LoRA
from .matrix import matrix_shape
from .ranked import Ranked


@dataclass(frozen=True, kw_only=True)
class SingularLoRA(LoRA):
    """LoRA whose factors start at singular triplets, which subclasses choose.

    The rank is capped by the smaller side of each weight's matrix.
    """

    scale_power = 0.5  # B0 and A0 are divided by the root of s
    gains = Ranked.gains  # which update is best depends on where the factors start

    def __post_init__(self):
        super().__post_init__()
        name = 'scale' if self.alpha is None else 'alpha'
        rule = 'must be positive, because singular values are divided by the scale.'
        require(self, name, self.scaling > 0, rule)

    def triplets(self, matrix: Tensor, rank: int) -> Triplets:
        """U (n, k), S (k,) and V^T (k, m) of a matrix (n, m); k is the rank, capped."""
        raise NotImplementedError

    def max_rank(self, spec):
        rows, inner, columns = matrix_shape(spec, 1, self.layout)
        return max(1, min(rows, columns) // inner)

    def init(self, weight, spec) -> Factors:
        rows, inner, columns = self.matrix_shape(spec)
        left, values, right = self.triplets(weight.reshape(rows, columns), inner)
        root = (values / self.scaling).sqrt()
        return {
            'lora_A': torch.zeros_like(right),
            'lora_B': torch.zeros_like(left),
            'start_A': nn.Buffer(root[:, None] * right),
            'start_B': nn.Buffer(left * root),
        }

    def penalty(self, factors, spec):
        if super().penalty(factors, spec) is None:
            return None
        moved = {f'lora_{x}': factors[f'start_{x}'] + factors[f'lora_{x}'] for x in 'AB'}
        return super().penalty(moved, spec)

    def matrices(self, factors):
        up = torch.cat([factors['lora_B'], factors['start_B']], 1)
        down = torch.cat([factors['start_A'] + factors['lora_A'], factors['lora_A']])
        return up, down


@register
class PiSSA(SingularLoRA):
    """LoRA from the largest singular values.

    ``niter`` power iterations of a randomised decomposition serve large weights
    (the paper's choices are 1 to 16); it is exact if None.
    """

    card = Card(
        family='extension',
        formula='W + s · (B A − B₀ A₀)',
        suits='Fast fitting: the strongest directions of the weight train.',
    )

    niter: int | None = None

    def __post_init__(self):
        super().__post_init__()
        rule = 'must be a number of power iterations, such as 4, or None for the exact triplets.'
        require(self, 'niter', self.niter is None or self.niter >= 0, rule)

    def triplets(self, matrix, rank):
        return leading(matrix, rank, self.niter)


@register
class MiLoRA(SingularLoRA):
    """LoRA from the smallest singular values."""

    card = Card(
        family='extension',
        formula='W + s · (B A − B₀ A₀)',
        suits='Keeping what was learnt: only the directions that the weight uses least train.',
    )

    def triplets(self, matrix, rank):
        return trailing(matrix, rank)
