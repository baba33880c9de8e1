"""LoHa: an elementwise product of two low-rank updates (arXiv:2108.06098).

    dW = (B1 A1) * (B2 A2)                              FedPara, Prop. 1
    dW = (T1 x_1 B1 x_2 A1') * (T2 x_1 B2 x_2 A2')      FedPara, Prop. 3

over the modes of the stored weight. The rank of the product is up to r^2, for
the parameters of a LoRA of rank 2 r. Two layouts treat a kernel:

``channel``  The stored weight unfolded along its first mode, as LoRA's.
``tucker``   Keeps its axes, which the cores T of size (r, r, *kernel) hold. A
             kernel of one element is a matrix.

The start is LyCORIS' (arXiv:2309.14859): B2 is zero, B1 and T Gaussian with
standard deviation 0.1, A1 and A2 with 1; a factor that is a single number
starts at its standard deviation. Ranks are capped by the sizes of the modes.
``alpha / rank`` is applied once (LyCORIS squares it when it merges).
"""

from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

from .base import Card, Factors, gaussian, register
from .flora import tucker
from .ranked import ScaledRankMethod
from .spec import WeightSpec


@dataclass(frozen=True, kw_only=True)
class KernelRankMethod(ScaledRankMethod):
    """A method that unfolds a kernel (``'channel'``) or keeps its axes (``'tucker'``)."""

    layout: Literal['channel', 'tucker'] = 'channel'

    def keeps_axes(self, spec: WeightSpec) -> bool:
        """Whether the weight has a kernel whose axes stay apart."""
        return self.layout == 'tucker' and prod(spec.kernel_size) > 1


def low_rank(up: Tensor, down: Tensor, core: Tensor | None = None) -> Tensor:
    """B A, or T x_1 B x_2 A' with a core (FedPara, Eq. 1 and Prop. 3), (n, m, *kernel).

    Shapes are B (n, r), A (s, m) and T (r, s, *kernel).
    """
    return torch.mm(up, down) if core is None else tucker(core, [up, down.T])


@register
class LoHa(KernelRankMethod):
    """Hadamard product of two updates of rank r."""

    card = Card(
        family='extension',
        formula='W + s · (B₁A₁) ∗ (B₂A₂)',
        suits='High-rank updates from few parameters: rank r² with the parameters of LoRA at rank '
        '2r.',
    )

    def sides(self, spec: WeightSpec) -> tuple[int, int]:
        """Rows of B and columns of A."""
        rows = spec.shape[0]
        return rows, spec.shape[1] if self.keeps_axes(spec) else spec.numel // rows

    def max_rank(self, spec):
        return (max if self.keeps_axes(spec) else min)(self.sides(spec))

    def init(self, weight, spec) -> Factors:
        def factor(*shape, std=1.0):
            if prod(shape) == 1:
                return weight.new_full(shape, std)
            return gaussian(weight, *shape, std=std)

        rows, columns = self.sides(spec)
        rank = inner = min(self.rank, rows, columns)
        factors = {}
        if self.keeps_axes(spec):
            rank, inner = min(self.rank, rows), min(self.rank, columns)
            for name in ('loha_T1', 'loha_T2'):
                factors[name] = factor(rank, inner, *spec.kernel_size, std=0.1)
        return factors | {
            'loha_B1': factor(rows, rank, std=0.1),
            'loha_A1': factor(inner, columns),
            'loha_B2': weight.new_zeros(rows, rank),
            'loha_A2': factor(inner, columns),
        }

    def delta(self, factors, spec) -> Tensor:
        one, two = (
            low_rank(factors[f'loha_B{i}'], factors[f'loha_A{i}'], factors.get(f'loha_T{i}'))
            for i in (1, 2)
        )
        return (one * two).view(spec.shape)
