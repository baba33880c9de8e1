"""MoSLoRA: mixture of subspaces in low-rank adaptation (arXiv:2406.11909).

    dW = reshape(B M A)

LoRA with a trained mixer M between the factors, square in their inner size. B
starts at zero, A and M as linear layers do (as in the published code), or M as
a random orthogonal matrix; the paper has both. ``mpc`` restricts the factors
alone and not what dW can be, since M can undo what is required of B and A.
"""

from typing import Literal

from torch import nn

from .base import Card, Factors, register, uniform
from .lora import LoRA


@register
class MoSLoRA(LoRA):
    """LoRA with a trained mixer between its factors, which starts as ``mixer_init``."""

    card = Card(
        family='extension',
        formula='W + s · reshape(B M A)',
        suits='As LoRA, with every direction of A free to reach every direction of B.',
    )

    mixer_init: Literal['kaiming', 'orthogonal'] = 'kaiming'

    def init(self, weight, spec) -> Factors:
        factors = super().init(weight, spec)
        size = len(factors['lora_A'])
        mixer = uniform(weight, size, size)
        if self.mixer_init == 'orthogonal':
            nn.init.orthogonal_(mixer)
        return factors | {'mixer': mixer}

    def matrices(self, factors):
        return factors['lora_B'] @ factors['mixer'], factors['lora_A']
