"""Methods whose dW is a product of two matrices, and the layouts that flatten a kernel for them.

``channel``  The stored weight unfolded along its first mode: rows are
             shape[0], columns all the rest.
``loralib``  loralib's, which the papers' parameter counts use. A square 2-d
             kernel becomes (out / groups k, in k), of inner size r k. Kernels
             of other dimensions put the first half of their axes on the side
             of the rows. It reshapes without regard to the kernel's axes, and
             on a depthwise convolution an adapter of rank 8 has eight times
             the parameters of the kernel.

On a linear layer the two agree.
"""

from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

from .base import Factors
from .delta import DeltaMethod
from .ranked import Ranked
from .spec import WeightSpec


def matrix_shape(spec: WeightSpec, rank: int, layout: str) -> tuple[int, int, int]:
    """Rows, inner size and columns of a product of some rank for a weight.

    Rows * columns is the weight's number of elements.
    """
    if layout == 'channel' or not spec.kernel_size:
        rows = spec.shape[0]
        return rows, rank, spec.numel // rows
    half = len(spec.kernel_size) // 2
    tall, wide = prod(spec.kernel_size[:half]), prod(spec.kernel_size[half:])
    return spec.out_features // spec.groups * tall, rank * tall, spec.in_features * wide


@dataclass(frozen=True, kw_only=True)
class MatrixMethod(Ranked, DeltaMethod):
    """dW = reshape(up @ down). Subclasses define :meth:`matrices`."""

    layout: Literal['channel', 'loralib'] = 'channel'

    def matrix_shape(self, spec: WeightSpec) -> tuple[int, int, int]:
        """Rows, inner size and columns of the product for a weight."""
        return matrix_shape(spec, self.rank, self.layout)

    def matrices(self, factors: Factors) -> tuple[Tensor, Tensor]:
        """``up`` (rows, inner) and ``down`` (inner, columns)."""
        raise NotImplementedError

    def delta(self, factors, spec):
        return torch.mm(*self.matrices(factors)).view(spec.shape)

    def low_rank(self, factors, spec):
        if spec.is_matrix:
            up, down = self.matrices(factors)
            return up, None, down
        if spec.is_plain and self.layout == 'channel':
            up, down = self.matrices(factors)
            return up, down.view(-1, *spec.shape[1:]), None
        return None
