"""Adapted networks through torch.compile, block by block."""

import torch
from torch import nn

from mmpeft.errors import UsageError
from mmpeft.execution import SPEED

from .blocks import BLOCKS, target_blocks
from .wrappers import on_inner

# Graphs of one forward function, beyond which torch runs it uncompiled. Four widths, two dtypes
# under autocast, training and evaluation make 16, and torch's own limit is 8.
GRAPHS = 64


@on_inner
def compile_blocks(model: nn.Module, **options) -> list[str]:
    """Compile the blocks of an adapted model one by one, in place.

    Equal blocks are compiled once, which takes seconds where a whole network takes minutes, and
    what lies between them, such as the heads of a detector, stays as it is. Parameters, names and
    files do not change. Call it after :func:`mmpeft.inject`.

    Args:
        model: Adapted. Blocks are the smallest repeated elements of lists with two layers or more,
            in the modules that were the targets.
        options: Of ``torch.nn.Module.compile``, such as ``mode='reduce-overhead'`` (CUDA graphs,
            for inputs of one size) or ``dynamic=False``.

    Returns:
        The paths of the blocks.

    Raises:
        UsageError: The model has no adapters, its targets have no blocks, or ``memory`` is not
            ``'speed'``: a compiled block keeps for backward what the compiler decides.
    """
    records = getattr(model, 'peft', [])
    if not records:
        raise UsageError('compile_blocks: the model has no adapters. Call mmpeft.inject first.')
    for memory in (record.memory for record in records):
        if memory != SPEED:
            raise UsageError(
                f'compile_blocks: the model was adapted with memory={memory!r}, and the compiler '
                'decides what a compiled block keeps. Leave one of the two out.'
            )
    found = target_blocks(model)
    if not found:
        names = ', '.join(repr(record.module) for record in records)
        raise UsageError(
            f'compile_blocks finds no blocks in {names} ({BLOCKS}). Compile the module itself with '
            'its method compile().'
        )
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, GRAPHS)
    for block in found.values():
        block.compile(**options)
    return list(found)
