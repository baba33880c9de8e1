"""Images as sequences of tokens, and the maps that they are."""

from collections.abc import Callable
from math import isqrt

import torch
from torch import Tensor

from mmpeft.errors import UsageError

# Class tokens and registers; a sequence with more than these beside the grid is another one.
MAX_EXTRA = 8

Grid = tuple[int, int]


def grid_of(length: int, grid: Grid | None, windows: bool = False) -> tuple[Grid, int]:
    """The grid of a sequence, and the number of class tokens and registers before it.

    Args:
        length: Of the sequence.
        grid: Of the patches of the image, (h, w), which merging may have halved since.
        windows: Whether a square of fewer positions than the grid can be a window.

    Returns:
        (h, w) and a number.

    Raises:
        UsageError: The length fits neither, or both a window and another map.
    """
    sizes = [tuple(-(-n // 2**times) for n in grid) for times in range(6)] if grid else []
    side = isqrt(length)
    if windows and grid and side**2 == length < grid[0] * grid[1]:
        sizes.append((side, side))
    fitting = {size for size in sizes if size[0] * size[1] == length}
    if len(fitting) > 1:
        whole, window = sorted(fitting, key=lambda size: size == (side, side))
        raise UsageError(
            f'A sequence of {length} tokens can be the whole map of {whole[0]}x{whole[1]} here, or '
            f'a window of {window[0]}x{window[1]}. Take images of another size, or leave attention '
            'out with targets.kinds.'
        )
    if fitting:
        return fitting.pop(), 0
    if grid and 0 < length - grid[0] * grid[1] <= MAX_EXTRA:
        return grid, length - grid[0] * grid[1]
    raise UsageError(
        f'A sequence of {length} tokens is not an image of patches that can be convolved: '
        + (f'the patches are a grid of {grid[0]}x{grid[1]}' if grid else 'no convolution cut it')
        + ', which may be halved, or have up to 8 tokens before it. Leave such modules out with '
        'targets.exclude, or choose among kinds with targets.kinds.'
    )


def on_maps(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    axis: int,
    grid: Grid | None,
    windows: bool = False,
) -> Tensor:
    """A function of maps on what a block works on.

    Args:
        function: From (N, channels, h, w) to the same size, with as many channels or others.
        x: A map with its channels at ``axis``, or tokens (N, L, channels). Each class token and
            register is a map of one position.
        axis: 1 or -1.
        grid: Of the patches, for tokens.
        windows: As in :func:`grid_of`.

    Raises:
        UsageError: The tokens are not a map, or ``x`` is a map of another number of axes.
    """
    if x.ndim == 4:
        return function(x.movedim(axis, 1)).movedim(1, axis)
    if x.ndim != 3 or axis % 3 != 2:
        raise UsageError(
            f'A tensor of shape {tuple(x.shape)} with channels at axis {axis} is neither a batch '
            'of 2-d maps nor of tokens, which alone can be convolved here. Leave such modules out '
            'with targets.exclude.'
        )
    size, extra = grid_of(x.shape[1], grid, windows)
    tokens, patches = x[:, :extra], x[:, extra:]
    y = function(patches.mT.unflatten(2, size)).flatten(2).mT
    if not extra:
        return y
    alone = function(tokens.flatten(0, 1)[..., None, None])
    return torch.cat([alone.view(len(x), extra, -1), y], 1)
