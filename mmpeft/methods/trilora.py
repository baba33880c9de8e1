"""TriLoRA: the update in the form of a compact SVD (arXiv:2405.11236).

    dW = reshape(B diag(lambda) A)         Subspace tuning, Sec. 4.1

with the matrices of LoRA's ``layout`` and one lambda for each inner index: r of
them on a matrix, r k on a kernel in ``loralib``'s layout. lambda starts
at zero, A and B Gaussian, so that the start is W, lambda has a gradient at
once and A and B have one from the second step on. Nothing holds B and A
orthogonal by itself, as the singular vectors of an SVD would be (Eq. 12-17);
``mpc='o'`` pulls them there. lambda may turn negative.

Subspace tuning's code draws A and B uniformly, within 1 / sqrt(columns) of
each. Here both have AdaLoRA's standard deviation of 0.02, since they stand
alike in the product: at a width of a thousand, rows of A and columns of B are
then about 0.6 long where Eq. 17 has 1, and lambda is from the start on the
scale of dW's singular values.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmpeft.errors import UsageError
from mmpeft.registry import METHODS

from .base import Card, Factors, gaussian
from .lora import LoRA, matrix_shape


def diagonal_product(up: Tensor, diagonal: Tensor, down: Tensor) -> Tensor:
    """B diag(lambda) A (Subspace tuning, Sec. 4.1).

    Args:
        up: B (n, r).
        diagonal: lambda (r,).
        down: A (r, m).

    Returns:
        (n, m).
    """
    return torch.mm(up * diagonal, down)


@METHODS.register_module()
@dataclass(frozen=True, kw_only=True)
class TriLoRA(LoRA):
    """LoRA with a trained diagonal between its factors.

    Attributes:
        init_std: Standard deviation of A and B.
        mpc: ``'o'`` (Eq. 20) or None.
    """

    card: ClassVar = Card(
        family='extension',
        formula='W + s · reshape(B diag(λ) A)',
        trains='A, B (Gaussian), λ (zero)',
        paper='TriLoRA (arXiv:2405.11236); Subspace tuning, Eq. 12-17 and 20',
        cost='One product to build the update.',
        suits="As LoRA; with mpc='o' the update stays near its SVD, and λ tells which ranks count.",
    )

    init_std: float = 0.02

    def __post_init__(self):
        super().__post_init__()
        if self.mpc == 'd':
            raise UsageError(
                f"{type(self).__name__}: mpc='d' leaves the lengths of B's columns free because "
                'LoRA has no diagonal of its own (Eq. 21); here lambda is that diagonal. Write '
                "mpc='o' (Eq. 20), or leave mpc out."
            )

    def init(self, weight, spec) -> Factors:
        rows, inner, columns = matrix_shape(spec, self.rank, self.layout)
        return {
            'lora_A': gaussian(weight, inner, columns, std=self.init_std),
            'lora_B': gaussian(weight, rows, inner, std=self.init_std),
            'lora_lambda': weight.new_zeros(inner),
        }

    def delta(self, factors, spec) -> Tensor:
        product = diagonal_product(factors['lora_B'], factors['lora_lambda'], factors['lora_A'])
        return product.view(spec.shape)

    def low_rank(self, factors, spec):
        if not spec.is_matrix:
            return None
        return factors['lora_B'] * factors['lora_lambda'], None, factors['lora_A']
