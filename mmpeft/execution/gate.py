"""Squeeze and excitation: a map times a gate, which has one number for each image and channel.

Their product costs little to compute again, and so does the map, if an activation follows a norm.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .activations import is_passed_through
from .classes import Fast
from .function import FastFunction
from .recompute import tag_for_recompute, through

PRODUCTS = torch.mul, torch.Tensor.mul


class FrozenGate(Fast):
    """A module that computes a gate from its input, and multiplies both."""

    def forward(self, x):
        if not is_passed_through(self, x):
            return super().forward(x)
        with _Gates(x):
            return super().forward(x)


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


class _Gates(TorchFunctionMode):
    """Computes products of a map and a gate by :func:`gated`."""

    def __init__(self, x):
        super().__init__()
        self.x = x

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in PRODUCTS and not kwargs:
            for x, gate in (args, args[::-1]):
                if x is self.x and _is_gate_of(x, gate):
                    return gated(x, gate)
        return function(*args, **(kwargs or {}))


def _is_gate_of(x, gate):
    if not isinstance(gate, Tensor) or gate.dtype != x.dtype or gate.ndim > x.ndim:
        return False
    return gate.numel() < x.numel() and torch.broadcast_shapes(x.shape, gate.shape) == x.shape
