"""How much of a network's activations is kept for backward, and how much is computed again.

========== ================================================ ===================================
memory     kept                                             computed again in backward
========== ================================================ ===================================
speed      what backward needs, each map once               norms and activations
balanced   that without the inputs of GELU and SiLU         the products before them too
small      the inputs of blocks (Chen, arXiv:1604.06174)    blocks up to their last product, with
                                                            random numbers as they were
========== ================================================ ===================================
"""

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mmpeft.transforms import is_transformed

from .activations import Activation
from .checkpointing import run_again
from .classes import Fast, change_class, set_attributes

SPEED, BALANCED, SMALL = MEMORY = 'speed', 'balanced', 'small'
PLAIN_DATA = Tensor | int | float | complex | str | bytes | type(None) | torch.dtype | torch.device


class RecomputedBlock(Fast):
    """A block that keeps its input and runs again in backward."""

    def forward(self, *args, **kwargs):
        run = super().forward
        if not torch.is_grad_enabled() or is_transformed():
            return run(*args, **kwargs)
        if not _is_plain_data((args, kwargs)):
            warnings.warn(
                f"memory='small': {type(self).__name__} gets an object that it may change (a cache "
                'of keys and values?), so it is not run twice, and keeps what backward needs. Call '
                'the model without it (use_cache=False).',
                stacklevel=2,
            )
            return run(*args, **kwargs)
        return run_again(run, *args, **kwargs)


def keep_less(root: nn.Module, memory: str, blocks: Iterable[nn.Module]) -> None:
    """Let the frozen layers of a network, or its blocks, keep less for backward.

    Args:
        root: Whose frozen layers were enabled before.
        memory: One of :data:`MEMORY`.
        blocks: Below ``root``, none inside another; what ``'small'`` runs again.
    """
    if memory == BALANCED:
        for layer in root.modules():
            if isinstance(layer, Activation):
                set_attributes(layer, repeats_products=True)
    elif memory == SMALL:
        for block in blocks:
            if not isinstance(block, RecomputedBlock):
                change_class(block, RecomputedBlock)


def _is_plain_data(value):
    if isinstance(value, dict):
        return all(map(_is_plain_data, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain_data, value))
    return isinstance(value, PLAIN_DATA)
