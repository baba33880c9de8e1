"""Maps that are cheaper to recompute than to keep.

A norm or an activation saves its input for backward, and the layer that
follows saves its output: twice the same content. A tag on the output says how
it follows from what is saved anyway, and the layer saves that.
"""

from collections.abc import Callable

import torch
from torch import Tensor

NAME = '_mmpeft_recompute'


def tag_for_recompute(y: Tensor, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Note on a tensor that it is ``function(*tensors)``, if a gradient flows through it.

    Other layers save the tensors anyway. The function is called outside autocast.
    """
    if y.requires_grad and not torch.compiler.is_compiling():
        setattr(y, NAME, (function, tensors, y._version))
    return y


def save_or_recompute(x: Tensor, allowed: bool = True) -> tuple[Callable, tuple[Tensor, ...]]:
    """A function that returns a tensor in backward, and its arguments, which are to be saved."""
    if allowed and hasattr(x, NAME):
        function, tensors, version = getattr(x, NAME)
        if x._version == version:
            return function, tensors
    return _itself, (x,)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another dtype, its tag with it."""
    y, (function, tensors) = x.to(dtype), save_or_recompute(x)
    if y is x or function is _itself:
        return y
    return tag_for_recompute(y, lambda *t: function(*t).to(dtype), *tensors)


def _itself(x):
    return x
