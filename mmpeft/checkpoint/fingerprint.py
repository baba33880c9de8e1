"""SHA-256 over tensors, and over the frozen base that an adapter belongs to."""

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from mmpeft.injection.weights import plain_key
from mmpeft.injection.wrappers import local_part
from mmpeft.quantization import Quantized, adopted, stored_in, stored_parts

from .keys import frozen_keys
from .sharding import on_whole


@on_whole(share=True)
def fingerprint(model: nn.Module, adapted: nn.Module | None = None) -> str:
    """:func:`digest` of the frozen base; '' if nothing is frozen.

    It does not depend on the device, nor on the names that
    :func:`mmpeft.inject` gives to adapted weights. Weights in few bits count as they are stored,
    and the fingerprint of a base that has some begins with their format, such as ``'nf4-'``.

    Args:
        model: Holds the values, with adapters or without.
        adapted: Says what is frozen, after :func:`mmpeft.inject`; ``model``
            itself if None.
    """
    names = [plain_key(key) for key in frozen_keys(model if adapted is None else adapted)]
    if not names:
        return ''
    state = {plain_key(key): value for key, value in model.state_dict(keep_vars=True).items()}
    base = {name: state[name] for name in names}
    formats = {stored_in(value) for value in base.values() if isinstance(adopted(value), Quantized)}
    return '-'.join([*sorted(formats), digest(base)])


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over tensors, sorted by name, as 64 hexadecimal digits; see :func:`digests`."""
    return hashlib.sha256(b''.join(digests(state).values())).hexdigest()


def digests(state: Mapping[str, Tensor]) -> dict[str, bytes]:
    """SHA-256 over each tensor, sorted by name: name, dtype, shape and every element; 32 bytes.

    Of weights in few bits what is stored; of a DTensor what this rank holds.
    """

    def digest_one(name):
        value = adopted(local_part(state[name]))
        whole = hashlib.sha256(f'{name} {value.dtype} {tuple(value.shape)}'.encode())
        for part_name, part in stored_parts(value).items():
            part = part.detach().cpu().contiguous()
            whole.update(part_name.encode())
            if part.numel():
                flat = part.as_strided((part.numel(),), (1,))  # one element may have any stride
                whole.update(flat.view(torch.uint8).numpy().data)
        return whole.digest()

    names = sorted(state)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(digest_one, names), strict=True))
