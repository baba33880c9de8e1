"""What was trained, apart from the frozen base that it belongs to.

The frozen base is never stored with an adapter. Its fingerprint is, and an
adapter is refused by any other base.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from .injection import inject
from .targets import adapter_parameters, layers
from .version import __version__

ORIGINAL = '.original'
MARK = 'parametrizations.'


def plain_key(key: str) -> str:
    """The name that a stored parameter has in the model without adapters."""
    path, mark, rest = key.rpartition(MARK)
    if not mark or not rest.endswith(ORIGINAL):
        return key
    return path + rest.removesuffix(ORIGINAL)


def frozen_keys(model: nn.Module) -> list[str]:
    """State-dict keys of the frozen base: what an adapter does not hold.

    These are the parameters below a target module that do not train, and the
    buffers there, such as BatchNorm's statistics.

    Args:
        model: After :func:`mmpeft.inject`.

    Returns:
        Keys of ``model.state_dict()``, in its order.
    """
    trains_base = [record.method.trains_base for record in getattr(model, 'peft', [])]
    if not trains_base or any(trains_base):
        return []
    prefixes = tuple(
        f'{record.targets.module}.' if record.targets.module else '' for record in model.peft
    )
    adapters = {id(p) for p in adapter_parameters(model)}
    return [
        key
        for key, value in model.state_dict(keep_vars=True).items()
        if key.startswith(prefixes) and not value.requires_grad and id(value) not in adapters
    ]


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """What was trained: adapters, unfrozen parameters, and all outside the target.

    Args:
        model: After :func:`mmpeft.inject`.

    Returns:
        A part of ``model.state_dict()`` without anything frozen.
    """
    frozen = set(frozen_keys(model))
    return {key: value for key, value in model.state_dict().items() if key not in frozen}


def complete(model: nn.Module, state: Mapping[str, Tensor], prefix: str = '') -> dict[str, Tensor]:
    """An adapter's state dict with the model's own frozen base put in.

    Keys of a model without adapters are translated, so that a plain
    checkpoint fills the base.

    Args:
        model: After :func:`mmpeft.inject`.
        state: From :func:`adapter_state_dict`, a whole state dict, or one of
            the plain model.
        prefix: That the keys of ``state`` have before the model's.

    Returns:
        A new dict; tensors are shared.
    """
    result = dict(state)
    own = model.state_dict()
    for key in own:
        plain = prefix + plain_key(key)
        if prefix + key not in result and plain in result:
            result[prefix + key] = result.pop(plain)
    for key in frozen_keys(model):
        result.setdefault(prefix + key, own[key])
    return result


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the frozen base: names, dtypes, shapes and every element.

    Equal before and after :func:`mmpeft.inject`'s renaming, on every device.

    Args:
        model: After :func:`mmpeft.inject`.

    Returns:
        64 hexadecimal digits; '' if nothing is frozen.
    """
    state = model.state_dict()
    keys = sorted(frozen_keys(model), key=plain_key)
    if not keys:
        return ''

    def digest(key):
        value = state[key].detach().cpu().contiguous()
        title = f'{plain_key(key)} {value.dtype} {tuple(value.shape)}'
        return hashlib.sha256(title.encode() + _bytes(value)).digest()

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return hashlib.sha256(b''.join(pool.map(digest, keys))).hexdigest()


def _bytes(value):
    return value.reshape(-1).view(torch.uint8).numpy().data if value.numel() else b''
