"""LoTR: low tensor rank adaptation (arXiv:2402.01376).

    dW_l = G_l x_1 A x_2 B

All weights l of equal shape and role share A and B, on the two channel modes
of the stored weight, and have a small core each (in the paper, a chosen set of
weights). The core of a kernel keeps the kernel's axes, which the paper does
not treat.

The core starts at zero, A and B Gaussian with standard deviation 1 / sqrt(r)
of their own r columns, which at the start is the published code: an Adam step
on the core moves W by about ``scale`` times the learning rate whatever the
rank. The factor of a mode of size 1 starts at 1.
"""

from torch import Tensor

from .base import Card, Factors, register
from .delta import DeltaMethod
from .flora import mode_factor, tucker
from .ranked import Ranked


@register
class LoTR(Ranked, DeltaMethod):
    """A small core for each weight between factors that equal weights share.

    ``rank`` is that of both channel modes, capped by their sizes; ``init_std`` the
    standard deviation of A and B, 1 / sqrt(rank) if None.
    """

    card = Card(
        family='extension',
        formula='Wₗ + s · Gₗ ×₁A ×₂B, A and B shared by all weights of a shape',
        suits='Deep networks of equal blocks: each additional block adds only its cores.',
    )

    tied = ('lotr_A', 'lotr_B')

    init_std: float | None = None

    def tie_key(self, spec):
        return tuple(spec.shape), spec.input_first, spec.groups

    def init(self, weight, spec) -> Factors:
        left, right = (mode_factor(weight, n, self.rank, self.init_std) for n in spec.shape[:2])
        core = weight.new_zeros(left.shape[1], right.shape[1], *spec.kernel_size)
        return {'lotr_A': left, 'lotr_B': right, 'core': core}

    def delta(self, factors, spec) -> Tensor:
        return tucker(factors['core'], [factors['lotr_A'], factors['lotr_B']])

    def low_rank(self, factors, spec):
        if not spec.is_plain:
            return None
        return factors['lotr_A'], factors['core'], factors['lotr_B'].T
