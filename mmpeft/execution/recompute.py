"""Maps that are cheaper to compute again than to keep.

A norm or an activation saves its input for backward, and the layer that
follows saves its output: twice the same content. A tag on the output says how
it follows from what is saved anyway, and the layer saves that.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

NAME = '_mmpeft_recompute'


class Recomputation(NamedTuple):
    """How a tensor follows from others.

    Attributes:
        function: Takes ``tensors``; called outside autocast.
        tensors: What is saved for backward in any case.
    """

    function: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]


def tag_for_recompute(y: Tensor, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Note on a tensor that it is ``function(*tensors)``, where a gradient flows through it."""
    if y.requires_grad and not torch.compiler.is_compiling():
        setattr(y, NAME, (Recomputation(function, tensors), y._version))
    return y


def recomputation_of(x: Tensor) -> Recomputation | None:
    """What was noted on a tensor; None if it was changed since."""
    found, version = getattr(x, NAME, (None, None))
    return found if found is not None and x._version == version else None


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another dtype, its tag with it."""
    y, found = x.to(dtype), recomputation_of(x)
    if y is x or found is None:
        return y
    return tag_for_recompute(y, lambda *t: found.function(*t).to(dtype), *found.tensors)


def save_or_recompute(x: Tensor) -> Recomputation:
    """How to get a tensor back in backward; its ``tensors`` are to be saved."""
    return recomputation_of(x) or Recomputation(_itself, (x,))


def _itself(x):
    return x
