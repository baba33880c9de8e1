"""MiSS: one shard of the columns for all of them (arXiv:2409.15371).

    dW = reshape(D [I I ... I])            Eq. 7, the paper's efficient form

D (rows, r) starts at zero and trains, and column j of the matrix has column j mod r of D: each
shard of r columns is changed alike. :mod:`.matrix` describes the layouts of kernels; on a linear
layer it is peft's MiSS, whose variants 'bat' and 'mini' are not here.

It is LoRA with a fixed A, and takes half of its parameters where a weight is square.
"""

import torch
from torch import Tensor

from .base import Card, Factors, register
from .matrix import MatrixMethod


def shards(rank: int, columns: int) -> Tensor:
    """Unit matrices beside each other, (rank, columns)."""
    return torch.eye(rank).repeat(1, -(-columns // rank))[:, :columns]


@register
class MiSS(MatrixMethod):
    """A matrix of ``rank`` r columns, repeated over all columns of the weight."""

    card = Card(
        family='extension',
        formula='W + s · reshape(D [I I … I])',
        suits='LoRA with only one trained factor: half of its parameters on a square weight.',
    )

    tied = ('shards',)

    def tie_key(self, spec):
        return self.matrix_shape(spec)[1:]

    def init(self, weight, spec) -> Factors:
        rows, inner, _ = self.matrix_shape(spec)
        return {'block': weight.new_zeros(rows, inner)}

    def rebuilt(self, spec) -> Factors:
        return {'shards': shards(*self.matrix_shape(spec)[1:])}

    def matrices(self, factors):
        return factors['block'], factors['shards']
