"""The contract of methods that act on activations, not on a weight.

They stand at places of a network (see :mod:`mmpeft.places`), change what goes
into a module or what comes out of it, and cannot be folded into a weight.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from mmpeft.places import Place, places

from .adapter import Adapter
from .base import Factors, Method


@dataclass(frozen=True, kw_only=True)
class ActivationMethod(Method):
    """A function on the input and output of a module.

    Subclasses define :meth:`init` and :meth:`after` or :meth:`before`.
    ``kinds`` are kinds of places.
    """

    kinds: ClassVar[tuple[str, ...]]
    merges: ClassVar[bool] = False

    def candidates(self, root: nn.Module) -> Iterator[tuple[str, nn.Module, str, Place]]:
        """All places below a module; the tensor's name is empty."""
        for path, module, place in places(root, self.kinds):
            if self.accepts(place):
                yield path, module, '', place

    def accepts(self, place: Place) -> bool:
        """Whether the method is defined at a place."""
        return True

    def init(self, weight: Tensor, place: Place) -> Factors:
        """Initial values; ``weight`` gives dtype and device (``weight.new_zeros``)."""
        raise NotImplementedError

    def before(self, x: Tensor, factors: Factors, place: Place) -> Tensor:
        """What the module gets in place of its input."""
        return x

    def after(self, x: Tensor, y: Tensor, factors: Factors, place: Place) -> Tensor:
        """What the module returns in place of its output.

        Args:
            x: The input that the module got.
            y: Its output, in the dtype of the factors.
            factors: Of the adapter.
            place: Where it stands.
        """
        return y


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
        return _replaced(args, kwargs, self.method.before(x, self.factors, self.spec))

    def forward(self, module, args, kwargs, output):
        """A forward hook with kwargs."""
        y = output[0] if isinstance(output, tuple) else output
        changed = self.method.after(_first(args, kwargs), y, self.factors, self.spec)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed


def _first(args, kwargs):
    return args[0] if args else next(iter(kwargs.values()))


def _replaced(args, kwargs, x):
    if args:
        return (x, *args[1:]), kwargs
    return args, {**kwargs, next(iter(kwargs)): x}
