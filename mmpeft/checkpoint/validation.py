"""Whether an adapter fits a model: methods, names, shapes, dtypes and the frozen base."""

from collections.abc import Iterator, Mapping
from itertools import zip_longest

from torch import Tensor, nn

from mmpeft.errors import UsageError
from mmpeft.injection.site import attached
from mmpeft.injection.weights import ADAPTERS, MARK, ORIGINAL, join
from mmpeft.quantization import FORMATS

from . import legacy
from .fingerprint import fingerprint
from .keys import adapter_keys, adapter_state_dict
from .late_buffers import late_buffers
from .plain_data import checked_method


def check_fits(
    model: nn.Module,
    state: Mapping[str, Tensor],
    manifest: Mapping,
    source: str,
    check_base: bool = True,
) -> None:
    """Refuse an adapter of other methods, places, shapes or another base.

    Args:
        model: After :func:`mmpeft.inject`.
        state: The adapter's state dict.
        manifest: Saved with it.
        source: What to call the adapter in errors.
        check_base: Compare the fingerprints of the frozen bases.

    Raises:
        UsageError: It does not fit; the message says where and what to write
            instead.
    """
    try:
        if legacy.is_former(manifest):
            manifest = legacy.upgraded(model, manifest, state)
        pairs = list(_definitions(model, manifest))
    except UsageError as error:
        raise UsageError(f'{source} does not fit this model: {error}') from error
    stored = adapter_keys(model)
    own = {k: tuple(v.shape) for k, v in model.state_dict().items() if stored.get(k) == k}
    repeated = stored.keys() - own.keys()
    given = {k: tuple(v.shape) for k, v in state.items() if _is_adapters(k) and k not in repeated}
    ignored = ('layout',) if given == own else ()  # it changes nothing but shapes
    different = [text for pair in pairs if (text := _difference(*pair, ignored=ignored))]
    if different:
        more = f' ({len(different)} adapters differ)' if len(different) > 1 else ''
        raise UsageError(
            f'{source} does not fit the adapters of this model: it has {different[0]}{more}. '
            "Adapt the model as the adapter was trained (in a config: default_hooks.peft's method "
            'and targets), or choose another file.'
        )
    _check_equal(given, own, source, 'Use the backbone that it was trained with.')
    if check_base:
        base = fingerprint(model)
        if base != manifest['fingerprint']:
            _check_trained(model, manifest, source)
        check_fingerprint(base, manifest, source)


def _check_trained(model, manifest, source):
    """Name other trained parameters, which are not part of the base that fingerprints compare."""
    theirs = {join(i['module'], name) for i in manifest['injections'] for name in i['trained']}
    ours = {record.prefix + name for record in model.peft for name in record.trained}
    if theirs != ours:
        sides = dict(file=sorted(theirs - ours), model=sorted(ours - theirs))
        listed = [
            f'{len(names)} in the {side} alone ({", ".join(names[:3])})'
            for side, names in sides.items()
            if names
        ]
        raise UsageError(
            f'{source} and this model train other parameters beside the adapters: '
            f'{" and ".join(listed)}. Give the unfreeze that it was trained with.'
        )


def check_fingerprint(base: str, manifest: Mapping, source: str) -> None:
    """Refuse an adapter whose manifest has another :func:`fingerprint` than the base's.

    Raises:
        UsageError: The message has both, or the formats of few bits where they differ.
    """
    theirs = manifest['fingerprint']
    format, own = (each.rpartition('-')[0] for each in (theirs, base))
    if format != own:
        held, has = (f'in {name}' if name else 'that are not in few bits' for name in (format, own))
        cure = f'Set frozen_dtype={format!r}' if format in FORMATS else f'Load a base {held}'
        if not format:
            cure = 'Leave frozen_dtype out'
        raise UsageError(
            f'{source} was trained on frozen weights {held}, and this model has weights {has}. '
            f'{cure} (in a config: default_hooks.peft.frozen_dtype, or that of the backbone), or '
            'set check_base=False to use it nevertheless.'
        )
    if base != theirs:
        raise UsageError(
            f'{source} was trained on another frozen base: fingerprint {theirs[:16] or "none"} in '
            f'the file, {base[:16] or "none"} in this model. Load the pretrained weights that it '
            "was trained on (the backbone's checkpoint, or the hook's base_checkpoint; a base "
            'that was never loaded from a file is lost unless save_frozen=True was set), or set '
            'check_base=False to use it nevertheless.'
        )


def check_whole(
    model: nn.Module,
    state: Mapping[str, Tensor],
    source: str,
    check_dtypes: bool = True,
    late: bool = False,
) -> None:
    """Refuse a state dict that is not exactly what an adapter file of a model holds.

    Without ``check_dtypes`` any floating-point type passes for any other. ``late`` lets pass what
    :func:`~mmpeft.checkpoint.late_buffers.make_late_buffers` will make.

    Raises:
        UsageError: Names, shapes or dtypes differ.
    """

    def kind(value):
        floating = value.is_floating_point() and not check_dtypes
        return f'{tuple(value.shape)} {"floating point" if floating else value.dtype}'

    own = {key: kind(value) for key, value in adapter_state_dict(model).items()}
    ignored = late_buffers(model, state) if late else ()
    given = {key: kind(value) for key, value in state.items() if key not in ignored}
    advice = (
        'Use the model that it was trained with, heads included; what was set to train by hand '
        'after mmpeft.inject (requires_grad_) has to train here too, or is named in unfreeze.'
    )
    _check_equal(given, own, source, advice)


def _definitions(model, manifest) -> Iterator[tuple[str, dict, dict]]:
    """For each adapter its place, and its definition in a manifest and in a model; {} for none."""
    methods = [checked_method(method, manifest['version']) for method in manifest['methods']]
    theirs, ours = {}, {}
    for entry in manifest['adapters']:
        name = join(entry['path'], entry['tensor'])
        theirs.setdefault(name, []).append(methods[entry['method']].definition())
    for site in attached(model):
        ours.setdefault(site.name, []).append(site.method.definition())
    for name in theirs | ours:
        given, own = theirs.get(name, []), ours.get(name, [])
        yield from ((name, a, b) for a, b in zip_longest(given, own, fillvalue={}))


def _difference(place, theirs, ours, ignored):
    """What differs, such as ``rank=8 at fc.weight, and the model rank=16``; '' for nothing."""
    if theirs.get('type') != ours.get('type'):
        names = [method.get('type', 'no adapter') for method in (theirs, ours)]
        return f'{names[0]} at {place[:200]}, and the model {names[1]}'
    keys = [k for k in theirs if k not in ignored and theirs[k] != ours[k]]
    given, own = (', '.join(f'{key}={method[key]!r}' for key in keys) for method in (theirs, ours))
    return f'{given} at {place[:200]}, and the model {own}' if keys else ''


def _check_equal(given, own, source, remedy):
    wrong = sorted(key for key in own.keys() | given.keys() if own.get(key) != given.get(key))
    if wrong:
        key = wrong[0]
        raise UsageError(
            f'{source} does not fit this model: {len(wrong)} tensors are missing, unexpected or of '
            f'another shape or dtype. The first is {key[:200]!r}: {given.get(key, "none")} in the '
            f'file, {own.get(key, "none")} in the model. {remedy}'
        )


def _is_adapters(key):
    return f'{ADAPTERS}.' in key or (MARK in key and not key.endswith(ORIGINAL))
