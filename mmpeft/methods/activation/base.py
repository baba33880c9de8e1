"""The contract of methods that act on activations, not on a weight.

They apply at insertion points of a network (:mod:`mmpeft.injection.insertion_points`), change what
goes into a module or what comes out of it, and cannot be merged into a weight.
"""

from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmpeft.errors import UsageError
from mmpeft.methods.adapter import Adapter
from mmpeft.methods.base import Factors, Method
from mmpeft.methods.precision import outside_autocast
from mmpeft.methods.spec import InsertionPoint


@dataclass(frozen=True, kw_only=True)
class ActivationMethod(Method):
    """A function of a module's input and output.

    Subclasses define :meth:`init`, and :meth:`before` or :meth:`after`, which run outside autocast
    and return the dtype of the activation that they change. ``kinds`` are of ``POINT_KINDS``.

    Attributes:
        needs_grid: Whether points have the ``grid`` of the patches of an image.
    """

    kinds: ClassVar[tuple[str, ...]]
    merges: ClassVar[bool] = False
    needs_grid: ClassVar[bool] = False

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

    def inside(self, x: Tensor, factors: Factors, point: InsertionPoint) -> Tensor:
        """What is added to the features ``x`` between attention and MLP of a ``'block'``."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class BranchMethod(ActivationMethod):
    """A method that adds a branch: y -> y + branch(x, y), in the factors' dtype."""

    def branch(self, x: Tensor, y: Tensor, factors: Factors, point: InsertionPoint) -> Tensor:
        """The summand, of the shape of ``y`` and the dtype of the factors."""
        raise NotImplementedError

    def after(self, x, y, factors, point):
        added = self.branch(x, y, factors, point)
        if added.shape != y.shape:  # torch would expand one of them
            raise UsageError(
                f'{type(self).__name__}: an insertion point returned a tensor of shape '
                f'{tuple(y.shape)} for {tuple(x.shape)}, as attention does that asks for the class '
                'token alone. Leave such modules out with targets.exclude.'
            )
        return (y.to(added.dtype) + added).to(y.dtype)


class ActivationAdapter(Adapter):
    """An adapter that hooks of its module call; ``ran`` once it has changed an activation."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.handles = []
        self.ran = False
        self._input = self._added = self._grid = self._patches = None

    def __getstate__(self):
        # An exception may leave a tensor with a graph, which cannot be copied.
        return self.__dict__ | dict(_input=None, _added=None)

    def hook(self, module: nn.Module) -> None:
        """Register the hooks of an insertion point.

        It calls the adapter itself after its forward, so that the adapter can be found there; what
        happens inside is between ``spec.ends``, if any.
        """
        # Of nn.MultiheadAttention the tokens may come before the images.
        self._turns = self.method.needs_grid and not getattr(module, 'batch_first', True)
        first, last = map(module.get_submodule, self.spec.ends or ('', ''))
        if self._is_block:
            self.handles += [
                first.register_forward_pre_hook(self.inside, with_kwargs=True),
                last.register_forward_pre_hook(self.check_order),
            ]
        elif self.spec.ends:
            self.handles += [
                first.register_forward_pre_hook(self.keep_input, with_kwargs=True),
                last.register_forward_hook(self.after, with_kwargs=True),
            ]
        elif type(self.method).before is not ActivationMethod.before:
            self.handles.append(module.register_forward_pre_hook(self.before, with_kwargs=True))
        self.handles.append(module.register_forward_hook(self, with_kwargs=True))

    def follow(self, patches: nn.Module) -> None:
        """Learn the grid of an image's patches from the convolution that cuts them."""
        if self._patches is not None:
            self._patches.remove()
        self._patches = patches.register_forward_hook(self.keep_grid)

    def unhook(self) -> None:
        while self.handles:
            self.handles.pop().remove()
        if self._patches is not None:
            self._patches.remove()

    def forward(self, module, args, kwargs, output):
        """A forward hook with kwargs of the insertion point."""
        between = self.spec.ends and not self._is_block
        return None if between else self.after(module, args, kwargs, output)

    def before(self, module, args, kwargs):
        """A forward pre-hook with kwargs that changes the input."""
        x = _first(args, kwargs)
        with outside_autocast(x.device.type), self._fitting(x):
            changed = self.method.before(x, self.factors, self._point)
        return _exchanged(args, kwargs, x, changed)

    def keep_input(self, module, args, kwargs):
        """A forward pre-hook with kwargs of the first layer between ``spec.ends``."""
        self._input = _first(args, kwargs)

    def keep_grid(self, module, args, output):
        """A forward hook of the convolution that cuts an image into patches."""
        self._grid = tuple(output.shape[-2:])

    def inside(self, module, args, kwargs):
        """A forward pre-hook with kwargs of the norm before the MLP of a block.

        What it adds goes around the MLP too: :meth:`after` adds it to the output of the block.
        """
        x = _first(args, kwargs)
        with outside_autocast(x.device.type), self._fitting(x):
            self._added = self.method.inside(x, self.factors, self._point)
            changed = (x.to(self._added.dtype) + self._added).to(x.dtype)
        return _exchanged(args, kwargs, x, changed)

    def check_order(self, module, args):
        """A forward pre-hook of the MLP of a block, before which its norm was called."""
        if self._added is None:
            raise UsageError(
                f'{type(self.method).__name__}: the MLP of a block runs before the norm '
                f'{self.spec.ends[0]!r}, as in post-norm transformers. It needs a norm before the '
                'MLP; leave such blocks out with targets.exclude.'
            )

    def after(self, module, args, kwargs, output):
        """A forward hook with kwargs that changes the output."""
        between = self.spec.ends and not self._is_block
        x, self._input = (self._input if between else _first(args, kwargs)), None
        self.ran = True
        self.check_sharding()
        if x is None:
            raise UsageError(
                f'{type(self.method).__name__}: the layer {self.spec.ends[0]!r} of an insertion '
                'point never ran: the network reads its weight without calling it. Leave it out '
                'with targets.exclude, or take a method on weights, such as LoRA.'
            )
        y = output[0] if isinstance(output, tuple) else output
        added, self._added = self._added, None
        with outside_autocast(x.device.type), self._fitting(x):
            if added is not None:
                y = (y.to(added.dtype) + added).to(y.dtype)
            if self._turns:
                x, y = x.transpose(0, 1), y.transpose(0, 1)
            changed = self.method.after(x, y, self.factors, self._point)
            changed = changed.transpose(0, 1) if self._turns else changed
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    @contextmanager
    def _fitting(self, x):
        """Raise UsageError in place of an error of torch about a tensor of another form."""
        try:
            yield
        except RuntimeError as error:
            outputs, inputs = self.spec.shape
            if not x.is_nested and x.shape[self.spec.axis] in (inputs, outputs):
                raise
            found = 'a nested tensor' if x.is_nested else f'a tensor of shape {tuple(x.shape)}'
            raise UsageError(
                f'{type(self.method).__name__} expects {inputs} channels at axis {self.spec.axis}, '
                f'and an insertion point got {found}. Leave such modules out with '
                'targets.exclude'
                + (', or write enable_nested_tensor=False.' if x.is_nested else '.')
            ) from error

    @property
    def _is_block(self):
        return bool(self.spec.ends) and 'block' in self.spec.kinds

    @property
    def _point(self):
        return replace(self.spec, grid=self._grid) if self.method.needs_grid else self.spec


def _first(args, kwargs):
    values = (*args, *kwargs.values())
    found = next(filter(torch.is_tensor, values), None)
    if found is None:
        kinds = ', '.join(sorted({type(value).__name__ for value in values})) or 'nothing'
        raise UsageError(
            f'An adapter of activations changes a tensor, and its module got none ({kinds}). Leave '
            'such modules out with targets.exclude. torch.fx (Proxy), which records calls without '
            'tensors, takes methods on weights alone, such as LoRA.'
        )
    return found


def _exchanged(args, kwargs, old, new):
    args = tuple(new if value is old else value for value in args)
    return args, {key: new if value is old else value for key, value in kwargs.items()}
