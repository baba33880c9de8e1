"""SHA-256 over tensors, and over the frozen base that an adapter belongs to."""

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from mmpeft.injection.weights import plain_key

from .keys import frozen_keys


def fingerprint(model: nn.Module, adapted: nn.Module | None = None) -> str:
    """SHA-256 over the frozen base: names, dtypes, shapes and every element.

    It does not depend on the device, nor on the names that
    :func:`mmpeft.inject` gives to adapted weights.

    Args:
        model: Holds the values, with adapters or without.
        adapted: Says what is frozen, after :func:`mmpeft.inject`; ``model``
            itself if None.

    Returns:
        64 hexadecimal digits; '' if nothing is frozen.
    """
    names = [plain_key(key) for key in frozen_keys(model if adapted is None else adapted)]
    if not names:
        return ''
    state = {plain_key(key): value for key, value in model.state_dict().items()}
    return digest({name: state[name] for name in names})


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over tensors: names, dtypes, shapes and every element, sorted by name.

    Returns:
        64 hexadecimal digits.
    """
    return hashlib.sha256(b''.join(digests(state).values())).hexdigest()


def digests(state: Mapping[str, Tensor]) -> dict[str, bytes]:
    """SHA-256 over each tensor: name, dtype, shape and every element.

    Returns:
        32 bytes each, sorted by name.
    """

    def digest_one(item):
        name, value = item
        value = value.detach().cpu().contiguous()
        whole = hashlib.sha256(f'{name} {value.dtype} {tuple(value.shape)}'.encode())
        whole.update(_bytes(value))
        return whole.digest()

    items = sorted(state.items())
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(sorted(state), pool.map(digest_one, items), strict=True))


def _bytes(value):
    return value.reshape(-1).view(torch.uint8).numpy().data if value.numel() else b''
