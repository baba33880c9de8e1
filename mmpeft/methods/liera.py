"""LieRA: LoRA in the Lie algebra (arXiv:2504.00851).

    W' = W * (1 + s B A)        Eq. 8, ``update='lie'``
    W' = W * exp(s B A)         Eq. 5 and 6, ``update='lie_exact'``

Any other method that gives a dW takes the same ``update`` argument; this is
the paper's name for LoRA with it. The default of s follows the weights, see
:class:`~.delta.DeltaMethod`. The paper's equations have no
s; its Tables 9 and 10 have alpha = 2 r, which is s = 2.
"""

from .base import Card, register
from .lora import LoRA
from .updates import Update


@register
class LieRA(LoRA):
    """LoRA's update, applied by the exponential map: of first order, as in the paper's runs."""

    card = Card(
        family='extension',
        formula='W ⊙ (1 + s · B A), or W ⊙ exp(s · B A); s ≈ 1 / rms(W)',
        suits='Updates in proportion to the weights: zeros stay zero, and small ones move little.',
    )

    update: Update = 'lie'
