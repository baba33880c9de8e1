"""Models on one frozen base share its memory."""

from collections.abc import Mapping
from contextlib import ExitStack

import torch
from torch import nn

from mmpeft.checkpoint.fingerprint import fingerprint
from mmpeft.checkpoint.keys import frozen_keys
from mmpeft.errors import UsageError
from mmpeft.injection.freeze import IN_COMMON
from mmpeft.injection.weights import plain_key
from mmpeft.injection.wrappers import refuse_sharded, unwrapped
from mmpeft.quantization import stored_in, stored_parts


def share_base(models: Mapping[str, nn.Module]) -> int:
    """Let adapted models with equal frozen bases share its memory.

    Tensors are compared element by element first. What only some of the
    models freeze, the others keep for themselves. Moving a model to another
    device or dtype afterwards gives it a base of its own again.

    Args:
        models: Adapted, on one device, by name; may be wrapped (DDP, torch.compile).

    Returns:
        Bytes that were freed.

    Raises:
        UsageError: Their bases differ, one has no adapters or is sharded; nothing is shared.
    """
    with ExitStack() as stack:
        bare = {}
        for name, model in models.items():
            refuse_sharded(model, 'share_base')
            bare[name] = stack.enter_context(unwrapped(model))
            if not getattr(bare[name], 'peft', []):
                raise UsageError(f'{name!r} has no adapters, so there is no frozen base to share.')
        return _share(bare)


def _share(models):
    held, same = {}, []
    for name, model in models.items():
        state = model.state_dict(keep_vars=True)
        for key in frozen_keys(model):
            owner, first = held.setdefault(plain_key(key), (name, state[key]))
            stored = [stored_in(tensor) for tensor in (first, state[key])]
            if stored[0] != stored[1]:
                raise UsageError(
                    f'{owner!r} and {name!r} have different frozen bases: {plain_key(key)} is in '
                    f'{stored[0]} in {owner!r} and in {stored[1]} in {name!r}. Adapters that were '
                    'trained on weights in different formats cannot share a backbone; serve them '
                    'separately.'
                )
            if not _equal(first, state[key]):
                prints = ' and '.join(f'{fingerprint(models[n])[:16]} ({n})' for n in (owner, name))
                raise UsageError(
                    f'{owner!r} and {name!r} have different frozen bases: {plain_key(key)} is not '
                    f'the same in both. The fingerprints are {prints}. Adapters that were trained '
                    'on different pretrained weights cannot share a backbone; serve them '
                    'separately.'
                )
            same.append((first, state[key]))
    freed = {}
    parts = [pair for first, tensor in same for pair in _parts(first, tensor)]
    for first, tensor in parts:
        if first.data_ptr() != tensor.data_ptr():
            freed[tensor.data_ptr()] = tensor.nbytes
            tensor.data = first.data
    for first, tensor in same:
        for each in (first, tensor):
            if isinstance(each, nn.Parameter):
                setattr(each, IN_COMMON, True)
    return sum(freed.values())


def _equal(a, b):
    alike = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
    return a is b or alike and all(torch.equal(*pair) for pair in _parts(a, b))


def _parts(a, b):
    return zip(stored_parts(a).values(), stored_parts(b).values(), strict=True)
