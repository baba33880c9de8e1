"""FLoRA: a low-rank core space for N dimensions (arXiv:2405.14739).

    dW = G x_1 A1 x_2 A2 ... x_N AN            Eq. 5; kernels Eq. 6, matrices Eq. 7

over the modes of the stored weight, so that a kernel keeps its axes. The core
starts at zero, the factors Gaussian. The paper leaves the Gaussian's width
open: here it is 1 / sqrt(J_n) for a factor of J_n columns, with which an Adam
step on the core moves W by about ``scale`` times the learning rate whatever
the rank. The factor of a mode of size 1 starts at 1. ``zero='factor0'`` starts as
LoRA does, with a zero factor of the first mode, and a Gaussian core in its place,
1 / sqrt(J_1) wide. The other factors are then 1 / sqrt(I_n) wide, as A of LoRA is by its inputs.
"""

from math import prod, sqrt
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from mmpeft.errors import UsageError

from .arguments import require
from .base import Card, Factors, gaussian, register
from .decomposition import core_energy
from .delta import DeltaMethod
from .ranked import Ranked
from .spec import WeightSpec


def tucker(core: Tensor, factors: list[Tensor]) -> Tensor:
    """G x_1 A1 x_2 A2 ... (FLoRA, Eq. 4), which leaves the modes after the factors' as they are.

    Args:
        core: (J_1, ..., J_N, ...).
        factors: N matrices (I_n, J_n).

    Returns:
        (I_1, ..., I_N, ...).
    """
    for factor in reversed(factors):
        core = torch.tensordot(factor, core, dims=([1], [len(factors) - 1]))
    return core


def mode_factor(weight: Tensor, size: int, rank: int, std: float | None) -> Tensor:
    """A new factor of a mode, (size, rank), the rank capped; ``std`` is 1 / sqrt(rank) if None."""
    if size == 1:
        return weight.new_ones(1, 1)
    rank = min(rank, size)
    return gaussian(weight, size, rank, std=std or rank**-0.5)


@register
class FLoRA(Ranked, DeltaMethod):
    """Tucker update over the modes of the stored weight.

    Attributes:
        rank: Of the two channel modes (r_1 = r_2 in the paper), or one each
            in the order in which the weight stores them, or one a mode of a
            whole kernel. Each is capped by its mode's size.
        kernel_rank: Of each kernel mode (r_3 in the paper), capped likewise.
        scale: s in Eq. 5; the paper chooses among 0.04, 0.4 and 4. If None it
            is 4, and for a Lie update what follows from 4.
        init_std: Standard deviation of what starts Gaussian; as above if None.
        zero: What starts at zero: ``'core'`` as in the paper, so that at first the core alone has a
            gradient, or ``'factor0'``, the factor of the first mode, which then alone has one.
    """

    card = Card(
        family='extension',
        formula='W + s · G ×₁A₁ ×₂A₂ … ×ₙAₙ',
        suits='Convolutional and mixed backbones: kernels keep their axes and take few parameters.',
    )

    default_scale = 4.0

    rank: int | tuple[int, ...] = 8
    kernel_rank: int = 2
    init_std: float | None = None
    zero: Literal['core', 'factor0'] = 'core'

    def __post_init__(self):
        super().__post_init__()
        require(self, 'kernel_rank', self.kernel_rank > 0, 'must be a positive integer.')

    def accepts(self, spec):
        return not spec.is_bias

    def ranks(self, spec: WeightSpec) -> tuple[int, ...]:
        """J_1, ..., J_N for a weight."""
        modes = len(spec.shape)
        rank = (self.rank,) * min(modes, 2) if isinstance(self.rank, int) else self.rank
        if len(rank) < modes:
            rank += (self.kernel_rank,) * len(spec.kernel_size)
        if len(rank) != modes:
            raise UsageError(
                f'FLoRA: rank={self.rank!r} does not fit a weight of shape {tuple(spec.shape)}. '
                f'Give one number, two for the channel modes, or {modes} for all modes.'
            )
        return tuple(min(r, size) for r, size in zip(rank, spec.shape, strict=True))

    def init(self, weight, spec) -> Factors:
        ranks, stds = self.ranks(spec), self.stds(spec)
        factors = {'core': weight.new_zeros(ranks)}
        for mode, (size, rank, std) in enumerate(zip(spec.shape, ranks, stds, strict=True)):
            factors[f'factor{mode}'] = mode_factor(weight, size, rank, std)
        if self.zero == 'factor0':
            factors['core'] = gaussian(weight, *ranks, std=stds[0])
            factors['factor0'] = torch.zeros_like(factors['factor0'])
        return factors

    def stds(self, spec: WeightSpec) -> tuple[float, ...]:
        """Standard deviations of the factors, or of the core in the place of the first."""
        ranks = self.ranks(spec)
        widths = ranks if self.zero == 'core' else (ranks[0], *spec.shape[1:])
        return tuple(self.init_std or width**-0.5 for width in widths)

    def first_step(self, spec):
        """An entry sums products of what starts Gaussian over the core, with signs."""
        modes = zip(spec.shape, self.ranks(spec), self.stds(spec), strict=True)
        return prod(std * sqrt(rank) for size, rank, std in modes if size > 1)

    def gains(self, weight, gradient, spec):
        """From the core of dL/d(dW): what the leading vectors of each mode capture of it."""
        energy = core_energy(self.update_gradient(weight, gradient, spec))
        last = torch.arange(self.max_rank(spec))
        channels = (last.clamp(max=size - 1) for size in spec.shape[:2])
        kernel = (min(self.kernel_rank, size) - 1 for size in spec.kernel_size)
        captured = energy[(*channels, *kernel)]
        return captured.diff(prepend=captured.new_zeros(1))

    def delta(self, factors, spec):
        return tucker(factors['core'], [factors[f'factor{n}'] for n in range(len(spec.shape))])

    def low_rank(self, factors, spec):
        if not spec.is_plain:
            return None
        core = factors['core']
        for mode in range(2, len(spec.shape)):
            factor = factors[f'factor{mode}']
            if factor.numel() == 1:
                core = (core * factor.view(())).movedim(2, -1)
            else:
                core = linear(core.movedim(2, -1), factor)
        return factors['factor0'], core, factors['factor1'].T
