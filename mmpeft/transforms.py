"""Whether torch runs operations, or records and transforms them."""

import torch
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Whether torch records or transforms operations instead of running them one by one.

    This is so in ``torch.compile``, ``torch.export``, ``torch.jit.trace``, the transforms of
    ``torch.func`` and forward-mode differentiation. They take torch's own operations alone.
    """
    if torch.compiler.is_compiling():
        return True
    recorded = torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
    return recorded or forward_ad._current_level >= 0
