"""Maps that are cheaper to compute again than to keep.

A norm or an activation keeps its input for backward, and the layer that
follows keeps its output: twice the same content. A recipe, hung on the
output, says how it follows from what is kept anyway, and the layer keeps that.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

NAME = '_mmpeft_recipe'


@dataclass(frozen=True)
class Recipe:
    """How a tensor follows from others.

    Attributes:
        function: Takes ``tensors``; called without gradients and autocast.
        tensors: What somebody keeps for backward in any case.
    """

    function: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]

    def then(self, function: Callable[[Tensor], Tensor]) -> 'Recipe':
        """The recipe of what a function makes of the tensor."""
        first = self.function
        return Recipe(lambda *tensors: function(first(*tensors)), self.tensors)


def remember(y: Tensor, recipe: Recipe | None) -> Tensor:
    """Hang a recipe on a tensor, where it will be of use."""
    if recipe is not None and y.requires_grad and not torch.compiler.is_compiling():
        setattr(y, NAME, (recipe, y._version))
    return y


def recipe_of(x: Tensor) -> Recipe | None:
    """The recipe that hangs on a tensor; None if it was changed since."""
    recipe, version = getattr(x, NAME, (None, None))
    return recipe if recipe is not None and x._version == version else None


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another dtype, its recipe with it."""
    recipe = recipe_of(x)
    y = x.to(dtype)
    if recipe is None or y is x:
        return y
    return remember(y, recipe.then(lambda t: t.to(dtype)))


def to_keep(x: Tensor) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """How to get a tensor back in backward, and what to keep for that."""
    recipe = recipe_of(x)
    return (_itself, (x,)) if recipe is None else (recipe.function, recipe.tensors)


def _itself(x):
    return x
