"""IA3, SSL and SSB: scales of channels (arXiv:2205.05638, arXiv:2407.05417).

    W' = D1 W D2            Subspace tuning, Eq. 7

with W as torch stores it, (out, in), and D1, D2 diagonal: IA3 has D1 alone,
SSL D2 alone, SSB both. (The paper has the transpose, with D1 and D2 exchanged.)
What is trained is the difference of each scale from one. A kernel keeps its
axes, and a grouped convolution has one scale a channel over all groups.

IA3's third vector in the paper scales the input of an MLP's second layer, and
is SSL on that layer; Subspace tuning scales the output of the first instead.
A bias, which the paper's models do not have, is not scaled.
"""

from dataclasses import dataclass
from typing import ClassVar

from .base import Card, Factors, Method, register
from .channels import per_input, per_output
from .normal_form import Scales

SHIFTS = 'shift_out', 'shift_in'


@dataclass(frozen=True, kw_only=True)
class ChannelScaling(Method):
    """Trained scales of the channels of some sides, ``'out'``, ``'in'`` or both."""

    sides: ClassVar[tuple[str, ...]]

    def init(self, weight, spec) -> Factors:
        sizes = {'out': spec.out_features, 'in': spec.in_features}
        return {f'shift_{side}': weight.new_zeros(sizes[side]) for side in self.sides}

    def apply(self, weight, factors, spec, training=False):
        shaped = {'out': per_output, 'in': per_input}
        for side in self.sides:
            weight = weight * (1 + shaped[side](factors[f'shift_{side}'], spec))
        return weight

    def normal_form(self, factors, spec, training=False):
        return Scales(*(1 + factors[name] if name in factors else None for name in SHIFTS))


@register
class IA3(ChannelScaling):
    """A trained scale of each output channel."""

    card = Card(
        family='reconstruction',
        formula='D₁ W, D₁ = 1 + diag(d₁)',
        suits='Budgets below a thousandth of the model.',
    )

    sides = ('out',)


@register
class SSL(ChannelScaling):
    """A trained scale of each input channel."""

    card = Card(
        family='reconstruction',
        formula='W D₂, D₂ = 1 + diag(d₂)',
        suits="The smallest budgets on layers that widen; half of IA3's parameters in the paper.",
    )

    sides = ('in',)


@register
class SSB(ChannelScaling):
    """A trained scale of each output and of each input channel."""

    card = Card(
        family='reconstruction',
        formula='D₁ W D₂, D = 1 + diag(d)',
        suits='Budgets below a thousandth of the model; the strongest of IA3, SSL and SSB.',
    )

    sides = ('out', 'in')
