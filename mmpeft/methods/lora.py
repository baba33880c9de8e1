"""LoRA: a product of two low-rank matrices (arXiv:2106.09685).

    dW = reshape(B A)           FLoRA, Eq. 2; kernels after Eq. 3

B starts at zero and A as a linear layer does, as in loralib (in FLoRA and LieRA
it is Gaussian). :mod:`.matrix` describes the two layouts of kernels. Eq. 3 prints
r for the inner size; the published counts are those of ``loralib``, in which A is
(r k, in k) and B (out/groups k, r k). In the default ``channel`` A is
(r, in/groups k k) and B (out, r).
"""

from math import sqrt
from typing import Literal

from torch.nn.functional import pad

from .base import Card, Factors, register, uniform
from .decomposition import squared_singular_values
from .matrix import MatrixMethod, matrix_shape
from .mpc import MPC
from .ranked import ScaledRankMethod


@register
class LoRA(ScaledRankMethod, MatrixMethod):
    """Low-rank update of the weight as a matrix.

    ``mpc`` names a constraint on the factors (:mod:`.mpc`), a term of the loss
    with the weight ``mpc_weight``, for which the paper has no figure.
    """

    card = Card(
        family='extension',
        formula='W + s · reshape(B A)',
        suits='Linear layers, and comparison with the literature. Flattens kernels.',
    )

    mpc: Literal['o', 'd'] | None = None
    mpc_weight: float = 0.1

    def init(self, weight, spec) -> Factors:
        rows, inner, columns = self.matrix_shape(spec)
        return {
            'lora_A': uniform(weight, inner, columns),
            'lora_B': weight.new_zeros(rows, inner),
        }

    def first_step(self, spec):
        """An entry sums ``inner`` entries of A with signs, each of variance 1 / (3 columns)."""
        _, inner, columns = self.matrix_shape(spec)
        return sqrt(inner / (3 * columns))

    def gains(self, weight, gradient, spec):
        """Squared singular values of dL/d(dW): the best product of a rank (Eckart and Young, 1936).

        In the ``loralib`` layout a rank adds as many of them as a side of the kernel has.
        """
        rows, inner, columns = matrix_shape(spec, 1, self.layout)
        matrix = self.update_gradient(weight, gradient, spec).reshape(rows, columns)
        squares = squared_singular_values(matrix)
        squares = pad(squares, (0, -len(squares) % inner))
        return squares.view(-1, inner).sum(1)[: self.max_rank(spec)]

    def matrices(self, factors):
        return factors['lora_B'], factors['lora_A']

    def penalty(self, factors, spec):
        if self.mpc is None:
            return None
        return self.mpc_weight * MPC[self.mpc](factors['lora_B'], factors['lora_A'])
