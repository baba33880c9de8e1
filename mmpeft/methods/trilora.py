"""TriLoRA: the update in the form of a compact SVD (arXiv:2405.11236).

    dW = reshape(B diag(lambda) A)         Subspace tuning, Sec. 4.1

with LoRA's matrices and one lambda for each inner index: r of them, or r k on
a kernel in the ``loralib`` layout. lambda starts at zero, A and B Gaussian, so
that lambda has a gradient in the first step, A and B from the second step on.
Nothing keeps B and A orthogonal, as the singular vectors of an SVD would be
(Eq. 12-17); ``mpc='o'`` pulls them there. lambda may become negative.

Subspace tuning's code draws A and B uniformly, within 1 / sqrt(columns) of
each. Here both have AdaLoRA's standard deviation of 0.02, since they have
equal parts in the product: at a width of a thousand, rows of A and columns of
B then have a length of about 0.6, where Eq. 17 has 1, and lambda is on the
scale of dW's singular values from the start.
"""

from dataclasses import dataclass
from typing import ClassVar

from mmpeft.registry import METHODS

from .arguments import require
from .base import Card, Factors, gaussian
from .lora import LoRA


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
        rule = (
            "leaves the lengths of B's columns free because LoRA has no diagonal (Eq. 21); here "
            "lambda is that diagonal. Write mpc='o' (Eq. 20), or leave mpc out."
        )
        require(self, 'mpc', self.mpc != 'd', rule)

    def init(self, weight, spec) -> Factors:
        rows, inner, columns = self.matrix_shape(spec)
        return {
            'lora_A': gaussian(weight, inner, columns, std=self.init_std),
            'lora_B': gaussian(weight, rows, inner, std=self.init_std),
            'lora_lambda': weight.new_zeros(inner),
        }

    def matrices(self, factors):
        return factors['lora_B'] * factors['lora_lambda'], factors['lora_A']
