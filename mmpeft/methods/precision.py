"""Mathematics that runs in the dtypes it is given, whatever autocast says."""

from contextlib import AbstractContextManager, nullcontext

import torch


def outside_autocast(device: str) -> AbstractContextManager:
    """A context without autocast on a type of device, such as ``'cuda'``."""
    if device == 'meta' or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)
