"""Products of maps, which cost little to compute again.

Squeeze and excitation multiplies a map by one number for each image and channel, a gated MLP (GLU,
arXiv:2002.05202) two maps. torch keeps both factors, the input of an activation that made one of
them, and the product for the layer behind it.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .activations import is_passed_through
from .classes import Fast
from .function import FastFunction
from .recompute import tag_for_recompute, through

PRODUCTS = torch.mul, torch.Tensor.mul


class FrozenGate(Fast):
    """A module that multiplies maps of its input."""

    def forward(self, *args, **kwargs):
        x = next((value for value in args if isinstance(value, Tensor)), None)
        if x is None or not is_passed_through(self, x):
            return super().forward(*args, **kwargs)
        with _Products(x):
            return super().forward(*args, **kwargs)


@dataclass(eq=False)
class Gated(FastFunction):
    """y = x g.

    Shapes: ``x`` and y any; ``gate`` broadcastable to them.
    """

    recomputes_input: ClassVar = True

    def forward(self, save, x, gate):
        return x * gate

    def gradients(self, needs, dy, x, gate):
        dx = dy * gate if needs[0] else None
        return dx, (dy * x).sum_to_size(gate.shape) if needs[1] else None

    def reference(self, x, gate):
        return x * gate


def gated(x: Tensor, gate: Tensor) -> Tensor:
    """x times a gate that is broadcastable to it, of one dtype."""
    y = Gated()(x, gate)
    again, kept = through(torch.mul, x, gate)
    return tag_for_recompute(y, again, *kept)


class _Products(TorchFunctionMode):
    """Computes products of maps by :func:`gated`, and notes what SiLU gives."""

    def __init__(self, x):
        super().__init__()
        self.ndim, self.numel = x.ndim, x.numel()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in PRODUCTS and not kwargs:
            for x, gate in (args, args[::-1]):
                if self._are_maps(x, gate):
                    return gated(x, gate)
        y = function(*args, **(kwargs or {}))
        return tag_for_recompute(y, F.silu, *args) if function is F.silu and not kwargs else y

    def _are_maps(self, x, gate):
        if not (isinstance(x, Tensor) and isinstance(gate, Tensor) and x.dtype == gate.dtype):
            return False
        if not (x.requires_grad and gate.requires_grad and x.ndim == self.ndim >= gate.ndim):
            return False
        is_large = x.numel() >= max(self.numel, gate.numel())
        return is_large and torch.broadcast_shapes(x.shape, gate.shape) == x.shape
