"""Mathematics that runs in the dtypes it is given, whatever autocast says."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


class _Outside:
    """What ``torch.autocast(device, enabled=False)`` does, in a quarter of its time."""

    def __init__(self, device):
        self.device = device

    def __enter__(self):
        torch.set_autocast_enabled(self.device, False)

    def __exit__(self, *error):
        torch.set_autocast_enabled(self.device, True)


NOWHERE = nullcontext()


def outside_autocast(device: str) -> AbstractContextManager:
    """A context without autocast on a type of device, such as ``'cuda'``."""
    if device == 'meta' or not torch.is_autocast_enabled(device):
        return NOWHERE
    if torch.compiler.is_compiling():
        return torch.autocast(device, enabled=False)
    return _Outside(device)


def in_double(x: Tensor) -> Tensor:
    """A tensor in float64, or in complex128; one of indices as it is."""
    if not (x.is_floating_point() or x.is_complex()):
        return x
    return x.to(torch.promote_types(x.dtype, torch.float64))
