"""MoSLoRA: mixture of subspaces in low-rank adaptation (arXiv:2406.11909).

    dW = reshape(B M A)

LoRA with a trained mixer M between the factors, square in the inner size of
LoRA's ``layout``: (r, r) on a matrix, (r k, r k) on a kernel in ``loralib``'s.
B starts at zero, A and M as linear layers do (Kaiming uniform within
1 / sqrt(columns), as in the published code), or M as a random orthogonal
matrix; the paper has both.

``mpc`` is LoRA's. Here it restricts the factors alone and not what dW can be,
since M is free to undo whatever B and A are made to be.
"""

from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

from torch import Tensor, nn

from mmpeft.registry import METHODS

from .base import Card, Factors, check_choice
from .lora import LoRA, matrix_shape


def kaiming_mixer(weight: Tensor, size: int) -> Tensor:
    """A uniform (size, size) matrix, bounded as a linear layer's weight."""
    bound = 1 / sqrt(size)
    return weight.new_empty(size, size).uniform_(-bound, bound)


def orthogonal_mixer(weight: Tensor, size: int) -> Tensor:
    """A random orthogonal (size, size) matrix."""
    return nn.init.orthogonal_(weight.new_empty(size, size))


MIXERS = {'kaiming': kaiming_mixer, 'orthogonal': orthogonal_mixer}


@METHODS.register_module()
@dataclass(frozen=True, kw_only=True)
class MoSLoRA(LoRA):
    """LoRA with a trained mixer between its factors.

    Attributes:
        mixer_init: Start of the mixer, ``'kaiming'`` or ``'orthogonal'``.
    """

    card: ClassVar = Card(
        family='extension',
        formula='W + s · reshape(B M A)',
        trains='A, mixer M (uniform, or M orthogonal), B (zero)',
        paper='MoSLoRA (arXiv:2406.11909)',
        cost='Two products to build the update.',
        suits='As LoRA, with every direction of A free to reach every direction of B.',
    )

    mixer_init: str = 'kaiming'

    def __post_init__(self):
        super().__post_init__()
        check_choice(self, 'mixer_init', MIXERS)

    def init(self, weight, spec) -> Factors:
        _, inner, _ = matrix_shape(spec, self.rank, self.layout)
        return super().init(weight, spec) | {'mixer': MIXERS[self.mixer_init](weight, inner)}

    def delta(self, factors, spec) -> Tensor:
        return (factors['lora_B'] @ factors['mixer'] @ factors['lora_A']).view(spec.shape)

    def low_rank(self, factors, spec):
        if not spec.is_matrix:
            return None
        return factors['lora_B'] @ factors['mixer'], None, factors['lora_A']
