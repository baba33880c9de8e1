"""FacT: factors that all layers share (arXiv:2212.03145).

    dW_l = U G_l V^T                                        FacT-TT
    dW_l = U (C x_3 P_l) V^T                                FacT-TK

A weight whose one channel mode is two to four times the other, such as of queries, keys and values
in one or of an MLP, is cut into squares. All weights whose pieces have one size share U (n, r) and
V (m, r), and with ``form='tk'`` C (r, r, r). Each piece has G (r, r) or P (r) of its own; that of
a kernel has the kernel's axes behind, which the paper does not treat.

V starts at zero and the rest uniform, as in the authors' program; s is chosen for each task
there. :mod:`.lotr` is FacT-TT without pieces and with another start.
"""

from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

from .base import Card, Factors, register, uniform
from .delta import DeltaMethod
from .ranked import Ranked
from .spec import WeightSpec


def pieces(spec: WeightSpec) -> tuple[int, int]:
    """Into how many pieces the two channel modes of the stored weight are cut."""
    n, m = spec.shape[:2]
    small, large = min(n, m), max(n, m)
    if small == 1 or large % small or not 2 <= large // small <= 4:
        return 1, 1
    return n // small, m // small


@register
class FacT(Ranked, DeltaMethod):
    """Cores for each weight between factors that all weights share.

    ``rank`` is that of both channel modes, capped by the sizes of a piece, and of P.
    """

    card = Card(
        family='extension',
        formula='Wₗ + s · U Gₗ Vᵀ, or s · U (C ×₃ Pₗ) Vᵀ; U, V and C shared',
        suits='Transformers of one width, where each additional weight adds only a small core.',
    )

    rank: int = 16
    form: Literal['tt', 'tk'] = 'tt'

    @property
    def tied(self):
        """C is there only in Tucker's form."""
        return ('left', 'right') if self.form == 'tt' else ('left', 'right', 'core')

    def sizes(self, spec: WeightSpec) -> tuple[int, int]:
        """Rows and columns of a piece."""
        cuts = pieces(spec)
        return spec.shape[0] // cuts[0], spec.shape[1] // cuts[1]

    def tie_key(self, spec) -> Any:
        return self.sizes(spec), spec.input_first, spec.groups

    def init(self, weight, spec) -> Factors:
        count, kernel, (n, m) = prod(pieces(spec)), spec.kernel_size, self.sizes(spec)
        r, s = min(self.rank, n), min(self.rank, m)
        shared = {'left': uniform(weight, n, r), 'right': weight.new_zeros(m, s)}
        if self.form == 'tt':
            cores = uniform(weight, r, s, count, *kernel).movedim(2, 0).contiguous()
            return shared | {'cores': cores.flatten(2)}  # of 5 axes a model takes no memory format
        core, own = uniform(weight, r, s, self.rank), uniform(weight, count, self.rank, *kernel)
        return shared | {'core': core, 'own': own}

    def cores(self, factors: Factors, spec: WeightSpec) -> Tensor:
        """G of all pieces, (pieces, r, s, *kernel)."""
        if self.form == 'tt':
            return factors['cores'].unflatten(2, (-1, *spec.kernel_size))
        return torch.tensordot(factors['own'], factors['core'], ([1], [2])).movedim(
            (-2, -1), (1, 2)
        )

    def delta(self, factors, spec):
        rows, _ = pieces(spec)
        product = torch.tensordot(self.cores(factors, spec), factors['left'], ([1], [1]))
        product = torch.tensordot(product, factors['right'], ([1], [1]))
        product = product.movedim((-2, -1), (1, 2))  # (pieces, n, m, *kernel)
        return product.flatten(0, 1) if rows > 1 else product.transpose(0, 1).flatten(1, 2)

    def low_rank(self, factors, spec):
        if not spec.is_plain:
            return None
        left, right, cores = factors['left'], factors['right'], self.cores(factors, spec)
        if len(cores) == 1:
            return left, cores[0], right.T
        if not spec.is_matrix:
            return None
        cores, (rows, _) = cores.flatten(2).unflatten(2, (-1,)), pieces(spec)
        if rows > 1:
            return (left @ cores).flatten(0, 1), None, right.T
        return left, None, (cores @ right.T).movedim(0, 1).flatten(1)
