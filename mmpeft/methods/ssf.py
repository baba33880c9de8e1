"""SSF: a scale and a shift of the output of each layer (arXiv:2210.08823).

    y -> g y + h
    W' = g W, b' = g b + h

with g and h one number for each output channel of a linear layer or convolution, and for each
channel of a norm. They start at 1 and 0 (in the paper at Gaussians of standard deviation 0.02
around them, which is not the identity); what trains is the difference of g from 1. Weight and bias
share g. A layer without a bias is scaled alone.
"""

from .base import Card, Factors, Method, register
from .channels import per_output


@register
class SSF(Method):
    """A trained scale and shift of each output channel."""

    card = Card(
        family='reconstruction',
        formula='D W and D b + Δb, D = 1 + diag(d)',
        suits='Small budgets on networks with norms and biases, which it changes too.',
    )

    kinds = ('conv', 'linear', 'norm')
    tied = ('scale',)
    tied_in_layer = True

    def accepts(self, spec):
        return True

    def init(self, weight, spec) -> Factors:
        scale = {'scale': weight.new_zeros(spec.out_features)}
        return scale | {'shift': weight.new_zeros(spec.shape)} if spec.is_bias else scale

    def tie_key(self, spec):
        return spec.out_features

    def apply(self, weight, factors, spec, training=False):
        scaled = weight * (1 + per_output(factors['scale'], spec))
        return scaled + factors['shift'] if spec.is_bias else scaled
