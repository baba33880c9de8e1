"""The contract of methods that act on activations, not on a weight.

They apply at insertion points of a network (:mod:`mmpeft.injection.insertion_points`), change what
goes into a module or what comes out of it, and cannot be merged into a weight.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmpeft.methods.adapter import Adapter
from mmpeft.methods.base import Factors, Method
from mmpeft.methods.precision import outside_autocast
from mmpeft.methods.spec import InsertionPoint


@dataclass(frozen=True, kw_only=True)
class ActivationMethod(Method):
    """A function of a module's input and output.

    Subclasses define :meth:`init`, and :meth:`before` or :meth:`after`, which run outside autocast
    and return the dtype of the activation that they change. ``kinds`` are of ``POINT_KINDS``.
    """

    kinds: ClassVar[tuple[str, ...]]
    merges: ClassVar[bool] = False

    def accepts(self, point: InsertionPoint) -> bool:
        """Whether the method is defined at an insertion point."""
        return True

    def narrow(self, points: dict[str, InsertionPoint]) -> dict[str, InsertionPoint]:
        """Of all insertion points that the method accepts in a network, by path, those to use."""
        return points

    def init(self, weight: Tensor, point: InsertionPoint) -> Factors:
        """Initial values; ``weight`` gives dtype and device (``weight.new_zeros``)."""
        raise NotImplementedError

    def before(self, x: Tensor, factors: Factors, point: InsertionPoint) -> Tensor:
        """The input of the module instead of ``x``."""
        return x

    def after(self, x: Tensor, y: Tensor, factors: Factors, point: InsertionPoint) -> Tensor:
        """The output of the module instead of ``y``; ``x`` is its input."""
        return y


@dataclass(frozen=True, kw_only=True)
class BranchMethod(ActivationMethod):
    """A method that adds a branch: y -> y + branch(x, y), in the factors' dtype."""

    def branch(self, x: Tensor, y: Tensor, factors: Factors, point: InsertionPoint) -> Tensor:
        """The summand, of the shape of ``y`` and the dtype of the factors."""
        raise NotImplementedError

    def after(self, x, y, factors, point):
        added = self.branch(x, y, factors, point)
        return (y.to(added.dtype) + added).to(y.dtype)


class ActivationAdapter(Adapter):
    """An adapter that hooks of its module call; ``ran`` once it has changed an activation."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.handles = []
        self.ran = False
        self._input = None

    def __getstate__(self):
        # An exception may leave a tensor with a graph, which cannot be copied.
        return self.__dict__ | dict(_input=None)

    def hook(self, module: nn.Module) -> None:
        """Register the hooks of an insertion point.

        It calls the adapter itself after its forward, so that the adapter can be found there; what
        happens inside is between ``spec.ends``, if any.
        """
        if self.spec.ends:
            first, last = map(module.get_submodule, self.spec.ends)
            self.handles += [
                first.register_forward_pre_hook(self.keep_input, with_kwargs=True),
                last.register_forward_hook(self.after, with_kwargs=True),
            ]
        elif type(self.method).before is not ActivationMethod.before:
            self.handles.append(module.register_forward_pre_hook(self.before, with_kwargs=True))
        self.handles.append(module.register_forward_hook(self, with_kwargs=True))

    def unhook(self) -> None:
        while self.handles:
            self.handles.pop().remove()

    def forward(self, module, args, kwargs, output):
        """A forward hook with kwargs of the insertion point."""
        return None if self.spec.ends else self.after(module, args, kwargs, output)

    def before(self, module, args, kwargs):
        """A forward pre-hook with kwargs that changes the input."""
        x = _first(args, kwargs)
        with outside_autocast(x.device.type):
            changed = self.method.before(x, self.factors, self.spec)
        args = tuple(changed if value is x else value for value in args)
        return args, {key: changed if value is x else value for key, value in kwargs.items()}

    def keep_input(self, module, args, kwargs):
        """A forward pre-hook with kwargs of the first layer between ``spec.ends``."""
        self._input = _first(args, kwargs)

    def after(self, module, args, kwargs, output):
        """A forward hook with kwargs that changes the output."""
        x, self._input = (self._input if self.spec.ends else _first(args, kwargs)), None
        self.ran = True
        self.check_sharding()
        y = output[0] if isinstance(output, tuple) else output
        with outside_autocast(x.device.type):
            changed = self.method.after(x, y, self.factors, self.spec)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed


def _first(args, kwargs):
    return next(value for value in (*args, *kwargs.values()) if torch.is_tensor(value))
