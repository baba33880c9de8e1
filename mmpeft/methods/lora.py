"""LoRA: a product of two low-rank matrices (arXiv:2106.09685).

    dW = reshape(B A)           FLoRA, Eq. 2; kernels Eq. 3

B starts at zero and A as a linear layer does. Two layouts flatten a kernel:

``loralib``  loralib's, which the papers' parameter counts use. For a square
             2-d kernel, A is (r k, in k) and B (out/groups k, r k), hence
             r k^2 (in + out/groups) parameters. Kernels of other dimensions
             put the first half of their axes on B's side. It reshapes without
             regard to the kernel's axes, and holds many times a depthwise
             kernel's own parameters.
``channel``  The stored weight unfolded along its first mode: B is
             (shape[0], r), A (r, the rest). On linear layers the two agree.
"""

from dataclasses import dataclass
from math import prod, sqrt
from typing import ClassVar

import torch
from torch import Tensor

from mmpeft.registry import METHODS

from .base import Card, Factors, check_choice
from .mpc import MPC
from .ranked import ScaledRankMethod
from .spec import WeightSpec


def matrix_shape(spec: WeightSpec, rank: int, layout: str) -> tuple[int, int, int]:
    """Rows, inner size and columns of B A for a weight.

    Args:
        spec: The weight's role.
        rank: r.
        layout: ``'loralib'`` or ``'channel'``.

    Returns:
        With rows * columns equal to the weight's number of elements.
    """
    if layout == 'channel' or not spec.kernel_size:
        rows = spec.shape[0]
        return rows, rank, spec.numel // rows
    half = len(spec.kernel_size) // 2
    tall, wide = prod(spec.kernel_size[:half]), prod(spec.kernel_size[half:])
    return spec.out_features // spec.groups * tall, rank * tall, spec.in_features * wide


@METHODS.register_module()
@dataclass(frozen=True, kw_only=True)
class LoRA(ScaledRankMethod):
    """Low-rank update of the weight as a matrix.

    Attributes:
        rank: r.
        alpha: dW is multiplied by alpha / rank.
        scale: In place of ``alpha``, the multiplier itself; 1 with neither.
        layout: How kernels become matrices, ``'loralib'`` or ``'channel'``.
        mpc: Pattern constraint on the factors as a term of the loss, ``'o'``
            or ``'d'`` (:mod:`.mpc`); None for none.
        mpc_weight: Of that term.
    """

    card: ClassVar = Card(
        family='extension',
        formula='W + s · reshape(B A)',
        trains='A (uniform), B (zero)',
        paper='LoRA (arXiv:2106.09685); FLoRA, Eq. 2 and 3',
        cost='One product to build the update.',
        suits='Linear layers, and comparison with the literature. Flattens kernels.',
    )

    layouts: ClassVar = ('loralib', 'channel')

    layout: str = 'loralib'
    mpc: str | None = None
    mpc_weight: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        check_choice(self, 'mpc', (None, *MPC))

    def init(self, weight, spec) -> Factors:
        rows, inner, columns = matrix_shape(spec, self.rank, self.layout)
        bound = 1 / sqrt(columns)
        return {
            'lora_A': weight.new_empty(inner, columns).uniform_(-bound, bound),
            'lora_B': weight.new_zeros(rows, inner),
        }

    def penalty(self, factors, spec):
        if self.mpc is None:
            return None
        return self.mpc_weight * MPC[self.mpc](factors['lora_B'], factors['lora_A'])

    def delta(self, factors, spec) -> Tensor:
        return torch.mm(factors['lora_B'], factors['lora_A']).view(spec.shape)

    def low_rank(self, factors, spec):
        if spec.is_matrix:
            return factors['lora_B'], None, factors['lora_A']
        if spec.is_plain and self.layout == 'channel':
            return factors['lora_B'], factors['lora_A'].view(-1, *spec.shape[1:]), None
        return None
