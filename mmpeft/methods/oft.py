"""OFT and BOFT: rotations within blocks of input channels (arXiv:2306.07280, 2311.06243).

    W' = W R^T,   R = (I - Q) (I + Q)^-1,   Q = -Q^T          OFT, Eq. 2 and Section 3.3
    W' = s W (R_m ... R_1)^T                                  BOFT, Section 4

with W the stored weight unfolded along its first mode, rows by n columns, and R block-diagonal
(OFT, Eq. 3): each block of columns is rotated on its own. The factors of BOFT take the columns in
other orders, as a fast Fourier transform does (BOFT, Eq. 2), so that m sparse ones make a dense R;
s is a scale for each row (OFT, Section 3.5). The upper triangle of Q trains, and s. They start at
the identity. The sign of Q is peft's.

``block_size`` is exchanged for the nearest size that divides n; BOFT's has to be even with
2^(m - 1) times as many columns to each block, and where n does not allow it, as in a kernel of
7 x 7, has fewer factors. OFT's constraint on the norm of Q (COFT, Eq. 4) is not here: it would
change parameters in a forward pass. Q's inverse is exact (peft's default is a series, and then R is
only nearly a rotation).

A rotation multiplies the weight, and has no thin form: W' is built in each forward pass.
"""

import torch
from torch import Tensor

from .arguments import require
from .base import Card, Factors, Method, register
from .spec import WeightSpec


def cayley(triangle: Tensor, size: int) -> Tensor:
    """Rotations from the upper triangles, row by row, of skew-symmetric matrices.

    Args:
        triangle: (..., size (size - 1) / 2)
        size: Rows and columns of a rotation.

    Returns:
        (..., size, size)
    """
    rows, columns = torch.triu_indices(size, size, 1, device=triangle.device)
    places = rows * size + columns
    upper = triangle.new_zeros(*triangle.shape[:-1], size * size)
    upper = upper.index_copy(-1, places, triangle).unflatten(-1, (size, size))
    upper = upper.to(torch.promote_types(upper.dtype, torch.float32))  # torch's solver needs it
    skew, identity = upper - upper.mT, torch.eye(size).to(upper)
    return torch.linalg.solve(identity + skew, identity - skew, left=False).to(triangle.dtype)


def rotate(matrix: Tensor, rotations: Tensor, reach: int = 1) -> Tensor:
    """W R^T for a block-diagonal R, whose blocks take columns in the order of a butterfly.

    Args:
        matrix: W (rows, n)
        rotations: (n / b, b, b)
        reach: Of ``reach`` b columns the j-th block has the j-th half block of the first half, and
            that of the second.
    """
    count, size, _ = rotations.shape
    order = count // reach, 2, reach, size // 2
    if reach > 1:
        matrix = matrix.unflatten(1, order).transpose(2, 3)
    blocks = matrix.reshape(len(matrix), count, size)
    rotated = torch.einsum('rni,noi->rno', blocks, rotations)
    if reach > 1:
        rotated = rotated.reshape(-1, order[0], reach, 2, size // 2).transpose(2, 3)
    return rotated.reshape(len(matrix), -1)


def nearest_size(columns: int, size: int, factors: int = 1) -> tuple[int, int]:
    """Size of blocks and number of factors that fit a number of columns."""
    while True:
        steps = 2 ** (factors - 1)
        fits = range(2, columns // steps + 1, 1 if factors == 1 else 2)
        found = [b for b in fits if columns % (b * steps) == 0]
        if found:
            return min(found, key=lambda b: abs(b - size)), factors
        factors -= 1


@register
class OFT(Method):
    """A rotation of each block of ``block_size`` columns."""

    card = Card(
        family='reconstruction',
        formula='W Rᵀ, R block-diagonal rotations',
        suits='Keeping the angles between neurons, as in image generation; more time per step.',
    )

    block_size: int = 32

    def __post_init__(self):
        super().__post_init__()
        require(self, 'block_size', self.block_size > 1, 'must be 2 or more.')

    def accepts(self, spec):
        """A single column has nothing to rotate."""
        return super().accepts(spec) and spec.numel > spec.shape[0]

    def blocks(self, spec: WeightSpec) -> tuple[int, int]:
        """Size of blocks and number of factors for a weight."""
        return nearest_size(spec.numel // spec.shape[0], self.block_size)

    def init(self, weight, spec) -> Factors:
        (size, factors), columns = self.blocks(spec), spec.numel // spec.shape[0]
        shape = factors, columns // size, size * (size - 1) // 2
        return {'triangle': weight.new_zeros(shape)}

    def apply(self, weight, factors, spec, training=False):
        size, _ = self.blocks(spec)
        matrix = weight.flatten(1)
        for step, rotations in enumerate(cayley(factors['triangle'], size)):
            matrix = rotate(matrix, rotations, 2**step)
        return matrix.view(weight.shape)


@register
class BOFT(OFT):
    """A product of ``factors`` m rotations, and a scale of each row."""

    card = Card(
        family='reconstruction',
        formula='s W (Rₘ ⋯ R₁)ᵀ, R block-diagonal rotations in the order of a butterfly',
        suits='Dense rotations with few parameters; time grows with the number of factors.',
    )

    block_size: int = 8
    factors: int = 2

    def __post_init__(self):
        super().__post_init__()
        require(self, 'factors', self.factors > 0, 'must be positive.')

    def blocks(self, spec):
        return nearest_size(spec.numel // spec.shape[0], self.block_size, self.factors)

    def init(self, weight, spec):
        return super().init(weight, spec) | {'shift': weight.new_zeros(spec.shape[0])}

    def apply(self, weight, factors, spec, training=False):
        rotated = super().apply(weight, factors, spec, training)
        return rotated * (1 + factors['shift']).view(-1, *(1,) * (weight.ndim - 1))
