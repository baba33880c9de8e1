"""Maps that are cheaper to recompute than to keep.

A norm or an activation saves its input for backward, and the layer that
follows saves its output: twice the same content. A tag on the output says how
it follows from what is saved anyway, and the layer saves that.

A tag counts where it was put on, under the same hooks for saved tensors. Inside a
checkpoint, tensors that come from outside have none: a second run may get them as
other objects, and has to save what the first one saved.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple
from weakref import ReferenceType, ref

import torch
from torch import Tensor

NAME = '_mmpeft_recompute'
OFFER = '_mmpeft_product'


class Tag(NamedTuple):
    """That a tensor is ``function(*tensors)``, as long as its version is the same."""

    function: Callable[..., Tensor]
    tensors: tuple[Tensor | None, ...]
    version: int
    hook: ReferenceType | None  # what packed saved tensors then


class Recipe(NamedTuple):
    """How backward gets a tensor: by a function of as many of the tensors that are saved."""

    restore: Callable[..., Tensor]
    count: int


class SharedRecompute:
    """A function that backward calls once for all layers that need its result."""

    def __init__(self, function: Callable[..., Tensor]):
        self.function, self.value, self.is_claimed = function, None, False

    def __call__(self, *tensors: Tensor) -> Tensor:
        """The result, held for the layers that need it after this one."""
        if torch.is_grad_enabled():
            return self.function(*tensors)
        if self.value is None:
            self.value = self.function(*tensors)
        return self.value

    def final(self, *tensors: Tensor) -> Tensor:
        """The result, for the first layer of the forward pass, which is the last of backward."""
        if torch.is_grad_enabled() or self.value is None:
            return self.function(*tensors)
        value, self.value = self.value, None
        return value


def tag_for_recompute(y: Tensor, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Note on a tensor that it is ``function(*tensors)``, if a gradient flows through it.

    Other layers save the tensors anyway. The function is called outside autocast.
    """
    if y.requires_grad and not torch.compiler.is_compiling():
        _put(y, NAME, SharedRecompute(function), tensors)
    return y


def is_tagged(x: Tensor | None) -> bool:
    """Whether a tensor has a tag that counts, and was not changed since."""
    return _tag(x, NAME) is not None


def offer_product(y: Tensor, function: Callable[..., Tensor], *tensors: Tensor | None) -> None:
    """Note on a product that it is ``function(*tensors)``, for :func:`accept_product`."""
    if y.requires_grad and not torch.compiler.is_compiling():
        _put(y, OFFER, function, tensors)


def accept_product(y: Tensor) -> bool:
    """Tag a product as what is recomputed, if it was offered and not changed since."""
    offer = _tag(y, OFFER)
    if offer is None:
        return False
    if not is_tagged(y):
        function, kept = through(offer.function, *offer.tensors)
        tag_for_recompute(y, function, *kept)
    return True


def saved_or_recomputed(
    tensors: Iterable[Tensor | None], first: bool = True
) -> tuple[list[Recipe | None], list[Tensor | None]]:
    """How backward gets each tensor, and what is saved for all of them.

    The recipe is None where the tensor itself is saved, as the first one is without ``first``.
    """
    recipes, kept = [], []
    for tensor in tensors:
        if not (is_tagged(tensor) and (first or recipes)):
            recipes.append(None)
            kept.append(tensor)
            continue
        shared, parts, *_ = getattr(tensor, NAME)
        restore, shared.is_claimed = shared if shared.is_claimed else shared.final, True
        recipes.append(Recipe(restore, len(parts)))
        kept += parts
    return recipes, kept


def restored(
    recipes: list[Recipe | None], kept: Sequence[Tensor | None], later: bool = False
) -> tuple[list, Sequence[Tensor | None]]:
    """The tensors of :func:`saved_or_recomputed`, and what else is kept behind them.

    ``later`` gives a function in place of the first tensor, which returns it.
    """
    tensors, start = [], 0
    for recipe in recipes:
        restore, count = (_itself, 1) if recipe is None else recipe
        end = start + count
        if later and not tensors:
            tensors.append(partial(restore, *kept[start:end]))
        else:
            tensors.append(kept[start] if recipe is None else restore(*kept[start:end]))
        start = end
    return tensors, kept[start:]


def through(
    function: Callable[..., Tensor], *tensors: Tensor | None
) -> tuple[Callable[..., Tensor], list[Tensor | None]]:
    """``function(*tensors)`` as a function of what is saved for the tensors, and its arguments."""
    recipes, kept = saved_or_recomputed(tensors)

    def again(*kept):
        return function(*restored(recipes, kept)[0])

    return again, kept


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another dtype, its tag with it."""
    if x.dtype == dtype:
        return x
    y = x.to(dtype)
    if not is_tagged(x):
        return y
    function, kept = through(lambda t: t.to(dtype), x)
    return tag_for_recompute(y, function, *kept)


def _put(y, name, function, tensors):
    hook = _hook()
    setattr(y, name, Tag(function, tensors, y._version, hook and ref(hook)))


def _tag(y, name):
    tag = getattr(y, name, None)
    if tag is None or tag.version != y._version:
        return None
    hook = _hook()
    is_same = hook is None if tag.hook is None else hook is not None and tag.hook() is hook
    return tag if is_same else None


def _hook():
    """What packs the tensors that are saved for backward now."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks and hooks[0]


def _itself(x):
    return x
