"""What was trained, apart from the frozen base that it belongs to.

The frozen base is never stored with an adapter. Its fingerprint is, and an
adapter is refused by any other base.
"""

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from mmpeft.errors import UsageError
from mmpeft.injection.attach import adapter_parameters, named_adapters
from mmpeft.injection.weights import ADAPTERS, MARK, ORIGINAL, plain_key
from mmpeft.version import __version__


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
    adapters = adapter_keys(model)
    return [
        key
        for key, value in model.state_dict(keep_vars=True).items()
        if key.startswith(prefixes) and not value.requires_grad and key not in adapters
    ]


def adapter_keys(model: nn.Module) -> dict[str, str]:
    """State-dict keys of all that adapters hold.

    Args:
        model: With adapters or without.

    Returns:
        Each key with the one that its tensor is stored under: of a tensor
        that adapters hold in common, the first.
    """
    held = {id(t) for adapter in named_adapters(model).values() for t in adapter.factors.values()}
    keys, first = {}, {}
    for key, value in model.state_dict(keep_vars=True).items():
        if id(value) in held:
            keys[key] = first.setdefault(id(value), key)
    return keys


def left_out(model: nn.Module) -> list[str]:
    """State-dict keys that an adapter is stored without: the frozen base, and repetitions."""
    repeated = [key for key, stored in adapter_keys(model).items() if key != stored]
    return frozen_keys(model) + repeated


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """What was trained: adapters, unfrozen parameters, and all outside the target.

    Args:
        model: After :func:`mmpeft.inject`.

    Returns:
        A part of ``model.state_dict()`` without anything frozen.
    """
    omitted = set(left_out(model))
    return {key: value for key, value in model.state_dict().items() if key not in omitted}


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
    for key, stored in adapter_keys(model).items():
        if prefix + stored in result:
            result.setdefault(prefix + key, result[prefix + stored])
    return result


def fingerprint(model: nn.Module, adapted: nn.Module | None = None) -> str:
    """SHA-256 over the frozen base: names, dtypes, shapes and every element.

    Equal before and after :func:`mmpeft.inject`'s renaming, on every device.

    Args:
        model: Holds the values, with adapters or without.
        adapted: Tells what is frozen, after :func:`mmpeft.inject`; the model
            itself if left out.

    Returns:
        64 hexadecimal digits; '' if nothing is frozen.
    """
    names = [plain_key(key) for key in frozen_keys(model if adapted is None else adapted)]
    if not names:
        return ''
    state = {plain_key(key): value for key, value in model.state_dict().items()}
    return digest({name: state[name] for name in names})


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over tensors: names, dtypes, shapes and every element, in the order of names.

    Returns:
        64 hexadecimal digits.
    """
    return hashlib.sha256(b''.join(digests(state).values())).hexdigest()


def digests(state: Mapping[str, Tensor]) -> dict[str, bytes]:
    """SHA-256 over each tensor: name, dtype, shape and every element.

    Returns:
        32 bytes each, in the order of names.
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


def describe(model: nn.Module) -> dict:
    """What an adapter has to say of itself: how it was injected, and on what.

    Args:
        model: After :func:`mmpeft.inject`.

    Returns:
        Plain data: ``version`` and ``torch``, ``injections``, ``parameters``
        of the adapters, and ``fingerprint``.
    """
    return dict(
        version=__version__,
        torch=str(torch.__version__),
        injections=[record.config() for record in getattr(model, 'peft', [])],
        parameters=sum(p.numel() for p in adapter_parameters(model)),
        fingerprint=fingerprint(model),
    )


def check_fits(
    model: nn.Module,
    state: Mapping[str, Tensor],
    description: Mapping,
    source: str,
    check_base: bool = True,
) -> None:
    """Refuse an adapter of another method, rank, target or base.

    Args:
        model: After :func:`mmpeft.inject`.
        state: The adapter's state dict.
        description: From :func:`describe`, at the time it was saved.
        source: What to call the adapter in errors.
        check_base: Compare the fingerprints of the frozen bases.

    Raises:
        UsageError: It does not fit; the message says what to write instead.
    """
    theirs = [_method_of(injection) for injection in description['injections']]
    ours = [_method_of(record.config()) for record in getattr(model, 'peft', [])]
    if theirs != ours:
        different = sorted(
            {
                k
                for a, b in zip(theirs, ours, strict=False)
                for k in {**a, **b}
                if a.get(k) != b.get(k)
            }
        )
        raise UsageError(
            f'{source} holds adapters of {_listed(theirs)}, and this model was adapted with '
            f'{_listed(ours)}; they differ in {", ".join(different) or "number"}. Set the '
            "config's method (default_hooks.peft.method) to the former, or choose another file."
        )
    stored = adapter_keys(model)
    own = {k: v.shape for k, v in model.state_dict().items() if stored.get(k) == k}
    repeated = {k for k in stored if k not in own}
    given = {k: v.shape for k, v in state.items() if _is_adapters(k) and k not in repeated}
    wrong = sorted(k for k in own.keys() | given.keys() if own.get(k) != given.get(k))
    if wrong:
        first = wrong[0]
        raise UsageError(
            f'{source} does not fit this model: {len(wrong)} adapter tensors are missing, '
            f'unexpected or of another shape. The first is {first[:200]}: '
            f'{_shape(given, first)} in the file, {_shape(own, first)} in the model. Use the '
            'rank, targets and backbone that it was trained with: '
            f'targets={description["injections"][0]["targets"]}.'
        )
    if check_base:
        check_fingerprint(fingerprint(model), description, source)


def check_fingerprint(base: str, description: Mapping, source: str) -> None:
    """Refuse an adapter of another base.

    Args:
        base: The :func:`fingerprint` of the model's own.
        description: From :func:`describe`, at the time the adapter was saved.
        source: What to call the adapter in errors.

    Raises:
        UsageError: The fingerprints differ.
    """
    theirs = description['fingerprint']
    if base != theirs:
        raise UsageError(
            f'{source} was trained on another frozen base: fingerprint {theirs[:16] or "none"} in '
            f'the file, {base[:16] or "none"} in this model. Load the pretrained weights that it '
            "was trained on (the backbone's checkpoint, or the hook's base_checkpoint; a base "
            'that was never loaded from a file cannot be found again unless save_frozen=True was '
            'set), or set check_base=False to use it all the same.'
        )


def check_whole(
    model: nn.Module, state: Mapping[str, Tensor], source: str, check_dtypes: bool = True
) -> None:
    """Refuse tensors that are not all those, and only those, that an adapter of a model holds.

    Args:
        model: After :func:`mmpeft.inject`.
        state: The adapter's state dict.
        source: What to call the adapter in errors.
        check_dtypes: Refuse other floating-point types, too; any other dtype
            is refused either way.

    Raises:
        UsageError: Names, shapes or dtypes differ.
    """

    def kind(value):
        floating = value.is_floating_point() and not check_dtypes
        return tuple(value.shape), 'floating point' if floating else value.dtype

    own = {key: kind(value) for key, value in adapter_state_dict(model).items()}
    given = {key: kind(value) for key, value in state.items()}
    wrong = sorted(k for k in own.keys() | given.keys() if own.get(k) != given.get(k))
    if wrong:
        first = wrong[0]
        raise UsageError(
            f'{source} does not fit this model: {len(wrong)} tensors are missing, unexpected or '
            f'of another shape or dtype. The first is {first[:200]!r}: {_kind(given, first)} in '
            f'the file, {_kind(own, first)} in the model. Use the model that it was trained with, '
            'heads included.'
        )


def _is_adapters(key):
    return f'{ADAPTERS}.' in key or (MARK in key and not key.endswith(ORIGINAL))


def _method_of(injection):
    return {k: v for k, v in injection['method'].items() if k not in ('dropout', 'budget')}


def _listed(methods):
    named = [
        f'{m["type"]}({", ".join(f"{k}={v!r}" for k, v in m.items() if k != "type")})'
        for m in methods
    ]
    return ' and '.join(named) or 'nothing'


def _shape(shapes, key):
    return tuple(shapes[key]) if key in shapes else 'none'


def _kind(kinds, key):
    return ' '.join(map(str, kinds[key])) if key in kinds else 'none'


def _bytes(value):
    return value.reshape(-1).view(torch.uint8).numpy().data if value.numel() else b''
