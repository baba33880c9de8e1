"""Memory for adapted weights and their gradients, used again and again.

The allocator of a CPU gives the memory of large tensors back to the system. Getting it again, page
by page, takes longer than to compute an adapted weight in it.
"""

import threading

import torch
from torch import Tensor, nn

WEIGHT, GRADIENT = 'weight', 'gradient'
_held = threading.local()


def memory(use: str, shape: torch.Size, dtype: torch.dtype, like: Tensor) -> Tensor | None:
    """Memory for a result that is needed no longer than until the next call for the same use.

    Each thread has its own. None for what is not on a CPU or has no data: other allocators keep
    theirs.
    """
    if not like.is_cpu or type(like) not in (Tensor, nn.Parameter):
        return None
    size = shape.numel() * dtype.itemsize
    held = getattr(_held, use, None)
    if held is None or len(held) < size:
        setattr(_held, use, None)
        with torch.inference_mode(False):
            held = torch.empty(size, dtype=torch.uint8)
        setattr(_held, use, held)
    return held[:size].view(dtype).view(shape)
