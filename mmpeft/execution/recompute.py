"""Maps that are cheaper to recompute than to keep.

A norm or an activation saves its input for backward, and the layer that
follows saves its output: twice the same content. A tag on the output says how
it follows from what is saved anyway, and the layer saves that.
"""

from collections.abc import Callable
from itertools import islice

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmpeft.transforms import is_transformed

NAME = '_mmpeft_recompute'
OFFER = '_mmpeft_product'


class Again:
    """A function that backward calls once for all layers that need its result."""

    def __init__(self, function: Callable[..., Tensor]):
        self.function, self.value, self.has_reader = function, None, False

    def __call__(self, *tensors: Tensor) -> Tensor:
        """The result, held for the layers that need it after this one."""
        if torch.is_grad_enabled():
            return self.function(*tensors)
        if self.value is None:
            self.value = self.function(*tensors)
        return self.value

    def last(self, *tensors: Tensor) -> Tensor:
        """The result, for the first layer of the forward pass, which is the last of backward."""
        if torch.is_grad_enabled() or self.value is None:
            return self.function(*tensors)
        value, self.value = self.value, None
        return value


def run_again(function: Callable, *args, **kwargs):
    """``function(*args, **kwargs)``, of which the arguments are kept, and which backward repeats.

    As it is where no gradient is wanted or torch transforms operations.
    """
    if not torch.is_grad_enabled() or is_transformed():
        return function(*args, **kwargs)
    return checkpoint(function, *args, use_reentrant=False, **kwargs)


def tag_for_recompute(y: Tensor, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Note on a tensor that it is ``function(*tensors)``, if a gradient flows through it.

    Other layers save the tensors anyway. The function is called outside autocast.
    """
    if y.requires_grad and not torch.compiler.is_compiling():
        setattr(y, NAME, (Again(function), tensors, y._version))
    return y


def is_tagged(x: Tensor | None) -> bool:
    """Whether a tensor has a tag and was not changed since."""
    return hasattr(x, NAME) and getattr(x, NAME)[-1] == x._version


def offer_product(y: Tensor, function: Callable[..., Tensor], *tensors: Tensor | None) -> None:
    """Note on a product that it is ``function(*tensors)``, for :func:`accept_product`."""
    if y.requires_grad and not torch.compiler.is_compiling():
        setattr(y, OFFER, (function, tensors, y._version))


def accept_product(y: Tensor) -> bool:
    """Tag a product as what is recomputed, if it was offered and not changed since."""
    function, tensors, version = getattr(y, OFFER, (None, (), None))
    if version != y._version:
        return False
    if not is_tagged(y):
        function, kept = through(function, *tensors)
        tag_for_recompute(y, function, *kept)
    return True


def save_or_recompute(x: Tensor, allowed: bool = True) -> tuple[Callable, tuple[Tensor, ...]]:
    """A function that returns a tensor in backward, and its arguments, which are to be saved."""
    if not allowed or not is_tagged(x):
        return _itself, (x,)
    again, tensors, _ = getattr(x, NAME)
    restore, again.has_reader = again if again.has_reader else again.last, True
    return restore, tensors


def through(
    function: Callable[..., Tensor], *tensors: Tensor | None
) -> tuple[Callable[..., Tensor], tuple[Tensor | None, ...]]:
    """``function(*tensors)`` as a function of what is saved for the tensors, and its arguments."""
    parts = [save_or_recompute(tensor) for tensor in tensors]
    counts = [(restore, len(kept)) for restore, kept in parts]

    def again(*kept):
        kept = iter(kept)
        return function(*(restore(*islice(kept, count)) for restore, count in counts))

    return again, tuple(tensor for _, kept in parts for tensor in kept)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another dtype, its tag with it."""
    y = x.to(dtype)
    if y is x or not is_tagged(x):
        return y
    function, kept = through(lambda t: t.to(dtype), x)
    return tag_for_recompute(y, function, *kept)


def _itself(x):
    return x
