"""Whether an adapter fits a model: method, shapes, dtypes and the frozen base."""

from collections.abc import Mapping

from torch import Tensor, nn

from mmpeft.errors import UsageError
from mmpeft.injection.weights import ADAPTERS, MARK, ORIGINAL

from .fingerprint import fingerprint
from .keys import adapter_keys, adapter_state_dict


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
