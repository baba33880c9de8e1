"""The contract of methods that act on activations, not on a weight.

They stand at places of a network (see :mod:`mmpeft.places`), change what goes
into a module or what comes out of it, and cannot be folded into a weight.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmpeft.errors import UsageError
from mmpeft.places import DESCRIPTIONS, PLACES, Place, places
from mmpeft.precision import outside_autocast
from mmpeft.registry import METHODS

from .adapter import Adapter
from .base import Factors, Method


@dataclass(frozen=True, kw_only=True)
class ActivationMethod(Method):
    """A function on the input and output of a module.

    Subclasses define :meth:`init` and :meth:`after` or :meth:`before`, which
    run outside autocast and return the dtype that they get. ``kinds`` are
    kinds of places.
    """

    kinds: ClassVar[tuple[str, ...]]
    merges: ClassVar[bool] = False

    def candidates(self, root: nn.Module) -> Iterator[tuple[str, nn.Module, str, Place]]:
        """All places below a module; the tensor's name is empty.

        Raises:
            UsageError: There are none.
        """
        found = False
        for path, module, place in places(root, self.kinds):
            if self.accepts(place):
                found = True
                yield path, module, '', place
        if not found:
            raise UsageError(self._nowhere(root))

    def _nowhere(self, root):
        found = Counter(
            kind for _, _, place in places(root, PLACES) for kind in PLACES if kind in place.kinds
        )
        fitting = [
            name
            for name, method in METHODS.module_dict.items()
            if issubclass(method, ActivationMethod) and found.keys() & set(method.kinds)
        ]
        wanted = ' or '.join(f'{kind!r} ({DESCRIPTIONS[kind]})' for kind in self.kinds)
        counts = ', '.join(f'{number} {kind!r}' for kind, number in found.items())
        return (
            f'{type(self).__name__} acts at places of kind {wanted}, and {type(root).__name__} has '
            f'none. It has {counts or "no place of any kind"}. '
            + (f'{", ".join(fitting)} would fit, and so would m' if fitting else 'M')
            + 'ethods on weights, such as LoRA, on whatever weights it has.'
        )

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
            y: Its output.
            factors: Of the adapter.
            place: Where it stands.
        """
        return y


@dataclass(frozen=True, kw_only=True)
class BranchMethod(ActivationMethod):
    """A method that adds a branch: y -> y + branch(x, y), in the factors' dtype."""

    def branch(self, x: Tensor, y: Tensor, factors: Factors, place: Place) -> Tensor:
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
