"""LieRA: LoRA in the Lie algebra (arXiv:2504.00851).

    W' = W * (1 + B A)          Eq. 8, ``update='lie'``
    W' = W * exp(B A)           Eq. 5 and 6, ``update='lie_exact'``

Any other method that gives a dW is coupled with it by its ``update``
argument; this name is the paper's, for LoRA.
"""

from dataclasses import dataclass
from typing import ClassVar

from mmpeft.registry import METHODS

from .base import Card
from .lora import LoRA


@METHODS.register_module()
@dataclass(frozen=True, kw_only=True)
class LieRA(LoRA):
    """LoRA's update, applied by the first-order exponential map.

    Attributes:
        update: ``'lie'`` (first order, the paper's experiments) or
            ``'lie_exact'``.
    """

    card: ClassVar = Card(
        family='extension',
        formula='W ⊙ (1 + s · B A), or W ⊙ exp(s · B A)',
        trains='A (uniform), B (zero)',
        paper='LieRA, Eq. 5-8 (arXiv:2504.00851)',
        cost='One product, and the dense gradient of W.',
        suits=(
            'Updates in proportion to the pretrained weights: zeros stay zero, and small '
            'weights move little.'
        ),
    )

    update: str = 'lie'
