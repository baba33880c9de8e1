"""TriLoRA: the update in the form of a compact SVD (arXiv:2405.11236).

    dW = reshape(B diag(lambda) A)         Subspace tuning, Sec. 4.1

with LoRA's matrices and one lambda for each inner index. lambda starts at zero
and trains in the first step, A and B from the second step on. Nothing keeps B
and A orthogonal, as the singular vectors of an SVD would be (Eq. 12-17);
``mpc='o'`` pulls them there. lambda may become negative.

A and B start Gaussian with AdaLoRA's standard deviation of 0.02, so that at a
width of a thousand their rows and columns have a length of about 0.6, where
Eq. 17 has 1. Subspace tuning's code draws them within 1 / sqrt(columns).
"""

from .arguments import require
from .base import Card, Factors, gaussian, register
from .lora import LoRA


@register
class TriLoRA(LoRA):
    """LoRA with a trained diagonal between its factors.

    ``init_std`` is the standard deviation of A and B; ``mpc`` is ``'o'`` or None.
    """

    card = Card(
        family='extension',
        formula='W + s · reshape(B diag(λ) A)',
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
