"""Whether torch runs operations, or records and transforms them."""

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode


def is_transformed() -> bool:
    """Whether torch records or transforms operations instead of running them one by one.

    This is so in ``torch.compile``, ``torch.export``, ``torch.jit.trace``, the transforms of
    ``torch.func``, forward-mode differentiation and selective activation checkpointing. They take
    torch's own operations alone, and the last keeps outputs that nothing may change in place.
    """
    if torch.compiler.is_compiling():
        return True
    recorded = torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
    return recorded or forward_ad._current_level >= 0 or _is_selective()


def _is_selective():
    modes = _CachingTorchDispatchMode, _CachedTorchDispatchMode
    return any(isinstance(mode, modes) for mode in _get_current_dispatch_mode_stack())
