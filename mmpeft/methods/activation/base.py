"""The contract of methods that act on activations, not on a weight.

They stand at places of a network (see :mod:`mmpeft.injection.insertion_points`), change what goes
into a module or what comes out of it, and cannot be folded into a weight.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmpeft.methods.adapter import Adapter
from mmpeft.methods.base import Factors, Method
from mmpeft.methods.precision import outside_autocast
from mmpeft.methods.spec import InsertionPoint


@dataclass(frozen=True, kw_only=True)
class ActivationMethod(Method):
    """A function on the input and output of a module.

    Subclasses define :meth:`init` and :meth:`after` or :meth:`before`, which
    run outside autocast and return the dtype that they get. ``kinds`` are
    kinds of places.
    """

    kinds: ClassVar[tuple[str, ...]]
    merges: ClassVar[bool] = False

    def accepts(self, place: InsertionPoint) -> bool:
        """Whether the method is defined at a place."""
        return True

    def narrow(self, points: dict[str, InsertionPoint]) -> dict[str, InsertionPoint]:
        """The insertion points to use, by path, of all that the method accepts in a network."""
        return points

    def init(self, weight: Tensor, place: InsertionPoint) -> Factors:
        """Initial values; ``weight`` gives dtype and device (``weight.new_zeros``)."""
        raise NotImplementedError

    def before(self, x: Tensor, factors: Factors, place: InsertionPoint) -> Tensor:
        """What the module gets in place of its input."""
        return x

    def after(self, x: Tensor, y: Tensor, factors: Factors, place: InsertionPoint) -> Tensor:
        """What the module returns in place of its output.

        Args:
            x: The input that the module got.
            y: Its output.
            factors: Of the adapter.
            place: Where it stands.
        """
        return y


@dataclass(frozen=True, kw_only=True)
class BranchMethod(ActivationMethod):
    """A method that adds a branch: y -> y + branch(x, y), in the factors' dtype."""

    def branch(self, x: Tensor, y: Tensor, factors: Factors, place: InsertionPoint) -> Tensor:
        """What is added, of the shape of y and the dtype of the factors."""
        raise NotImplementedError

    def after(self, x, y, factors, place):
        added = self.branch(x, y, factors, place)
        return (y.to(added.dtype) + added).to(y.dtype)


class ActivationAdapter(Adapter):
    """The hooks that a module with an adapter calls around its forward.

    Attributes:
        handles: Of the hooks, to take them off.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.handles = []

    def before(self, module, args, kwargs):
        """A forward pre-hook with kwargs."""
        x = _first(args, kwargs)
        with outside_autocast(x.device.type):
            changed = self.method.before(x, self.factors, self.spec)
        args = tuple(changed if value is x else value for value in args)
        return args, {key: changed if value is x else value for key, value in kwargs.items()}

    def forward(self, module, args, kwargs, output):
        """A forward hook with kwargs."""
        x, y = _first(args, kwargs), output[0] if isinstance(output, tuple) else output
        with outside_autocast(x.device.type):
            changed = self.method.after(x, y, self.factors, self.spec)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed


def _first(args, kwargs):
    return next(value for value in (*args, *kwargs.values()) if torch.is_tensor(value))
