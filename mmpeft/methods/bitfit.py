"""BitFit: train the biases alone (arXiv:2106.10199).

    b' = b + db            Subspace tuning, Eq. 8 and 9

with db starting at zero. The frozen bias and its change are held apart, so
that the adapter can be stored, merged and removed as any other. Layers without
a bias get none.
"""

from .base import Card, register
from .delta import DeltaMethod


@register
class BitFit(DeltaMethod):
    """A trained shift of each bias, in layers of every kind."""

    card = Card(
        family='reconstruction',
        formula='b + Δb',
        suits='The smallest budgets, and a first baseline.',
    )

    kinds = None

    def accepts(self, spec):
        return spec.is_bias

    def init(self, weight, spec):
        return {'shift': weight.new_zeros(spec.shape)}

    def delta(self, factors, spec):
        return factors['shift']
