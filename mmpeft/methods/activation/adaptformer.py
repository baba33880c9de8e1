"""AdaptFormer: a bottleneck with biases beside the MLP (arXiv:2205.13535).

    MLP(x) -> MLP(x) + s (relu(x A + a) B + b)

with x what the MLP gets, behind its norm, A (d, r) and B (r, d); s is 0.1. B and the biases start
at zero, A uniform as in a linear layer. It is the scaled parallel adapter with biases, another
scale and, in the paper, r = 64. The authors' program feeds it what the norm gets, and drops
entries between A and B with a probability of 0.1.
"""

from mmpeft.methods.base import Card, register

from .bottleneck import ACTIVATIONS, across_channels
from .parallel import ScaledParallelAdapter


@register
class AdaptFormer(ScaledParallelAdapter):
    """A bottleneck of ``rank`` r with biases beside each MLP."""

    card = Card(
        family='activations',
        formula='MLP(x) + s · (h(x A + a) B + b)',
        suits='Vision transformers; a common baseline next to VPT.',
    )

    rank: int = 64
    scale: float = 0.1

    def init(self, weight, point):
        biases = {
            'down_bias': weight.new_zeros(self.rank),
            'up_bias': weight.new_zeros(point.out_features),
        }
        return super().init(weight, point) | biases

    def branch(self, x, y, factors, point):
        x = x.to(factors['down'].dtype)
        inner = across_channels(x, factors['down'], factors['down_bias'], point.axis)
        active = ACTIVATIONS[self.activation](inner)
        added = across_channels(active, factors['up'], factors['up_bias'], point.axis)
        return self.scale * added
