"""Activation checkpointing that does not repeat the last product of a block.

torch's checkpoint ends a recomputation as soon as everything that was saved is there again. Two
things delay that until the last product of a block, a third to half of its work, is repeated in
vain: an autograd function saves after it has computed, and what follows the product saves too (the
mask of a drop path, a scale, the output of a ReLU). So products save first here, and what follows
the last one is kept if it is small, or the output of the block itself.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from mmpeft.transforms import is_transformed

SMALL_PART = 16  # What follows the last product is kept up to this part of the output's elements.


def run_again(function: Callable, *args, **kwargs):
    """``function(*args, **kwargs)``, of which the arguments are kept, and which backward repeats.

    Lists and dicts among them are kept as they are now: their owner may change them. As it is where
    no gradient is wanted or torch transforms operations.
    """
    if not torch.is_grad_enabled() or is_transformed():
        return function(*args, **kwargs)
    run = _Run(function, args, kwargs)
    args, kwargs = tree_map(lambda leaf: leaf, (args, kwargs))
    with set_checkpoint_early_stop(True):  # What is kept is not saved a second time.
        y = checkpoint(run, *args, use_reentrant=False, **kwargs)
    run.keep_rest()
    return y


class SavedTensors:
    """Tensors that are saved for backward by the hooks that are in force."""

    def __init__(self, tensors: Iterable[Tensor | None]):
        with torch.enable_grad():
            self.holder = _Save.apply(torch.empty(0, requires_grad=True), *tensors)

    @property
    def saved_tensors(self) -> tuple[Tensor | None, ...]:
        """Them."""
        return self.holder.grad_fn.saved_tensors


def save_first(*tensors: Tensor | None) -> SavedTensors | None:
    """Save what a product needs in backward before it is computed, where a block is repeated.

    To be called in the forward of an autograd function. If it returns None, the function saves the
    tensors itself, and nothing before them.
    """
    run = _running.get()
    if run is None:
        return None
    if not run.is_repeated:
        run.end = len(run.saved) + sum(t is not None for t in tensors)
        return None
    return SavedTensors(tensors)


class _Run:
    """A function that is called twice, in forward with ``args`` and in backward."""

    def __init__(self, function: Callable, args: tuple, kwargs: dict):
        self.function, self.first, self.is_repeated = function, (args, kwargs), False
        self.saved, self.end = [], 0  # of forward; how many there are up to the last product

    def __call__(self, *args, **kwargs):
        before = _running.set(self)
        try:
            if self.is_repeated:
                return self.function(*args, **kwargs)
            (args, kwargs), self.first = self.first, None
            with saved_tensors_hooks(self._pack, _Saved.get):
                y = self.function(*args, **kwargs)
            self.is_repeated = True
            self._leave_to_checkpoint(y)
            return y
        finally:
            _running.reset(before)

    def keep_rest(self) -> None:
        """Save what is left of forward, as an autograd function outside the checkpoint would."""
        rest, self.saved = self.saved, []
        _save_for(rest)

    def _pack(self, tensor):
        self.saved.append(_Saved(tensor))
        return self.saved[-1]

    def _leave_to_checkpoint(self, y):
        """Leave to the checkpoint what is saved up to the last product, or everything."""
        outputs, rest = [*filter(_is_dense, _tensors(y))], self.saved[self.end :]
        kept = [_kept(saved.tensor, outputs) for saved in rest]
        if self.end == 0 or any(tensor is None for tensor in kept):
            rest, kept = [], []
        _save_for(self.saved[: len(self.saved) - len(rest)])
        for saved, tensor in zip(rest, kept, strict=True):
            saved.tensor = tensor
        self.saved = rest


class _Saved:
    """A tensor that an operation of a block has saved, or where it comes from in backward."""

    def __init__(self, tensor: Tensor):
        self.tensor, self.restore = tensor, None

    def get(self) -> Tensor:
        if self.restore is None:
            return self.tensor  # backward inside the block
        if self.tensor is None:
            self.restore()
        tensor, self.tensor = self.tensor, None
        return tensor


class _Save(Function):
    @staticmethod
    def forward(ctx, leaf, *tensors):
        ctx.save_for_backward(*tensors)
        return leaf.new_empty(0)

    @staticmethod
    def backward(ctx, _):
        raise AssertionError('nothing depends on this output')


_running: ContextVar[_Run | None] = ContextVar('_running', default=None)


def _save_for(several: list[_Saved]) -> None:
    """Save their tensors at once, and let go of them."""
    if not several:
        return
    group, places = SavedTensors(saved.tensor for saved in several), [*map(weakref.ref, several)]

    def restore():
        for place, tensor in zip(places, group.saved_tensors, strict=True):
            if (saved := place()) is not None:
                saved.tensor = tensor

    for saved in several:
        saved.tensor, saved.restore = None, restore


def _kept(tensor, outputs):
    """What takes the place of a tensor that is kept; None if it is too large, or not dense."""
    if not _is_dense(tensor):
        return None
    for y in outputs:
        if _memory_of(y) == _memory_of(tensor):
            return y.detach()  # torch notices if it is changed in place
    return tensor if any(SMALL_PART * tensor.numel() <= y.numel() for y in outputs) else None


def _is_dense(tensor):
    return tensor.layout is torch.strided and not tensor.is_nested


def _memory_of(tensor):
    storage = tensor.untyped_storage()
    return storage._cdata, tensor.storage_offset(), tensor.shape, tensor.stride()


def _tensors(value) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
