"""What a checkpoint is to a model, its base or its adapters, and how both get into the model."""

import logging
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mmengine.logging import print_log
from mmengine.runner.checkpoint import _load_checkpoint
from torch import nn

from mmpeft.checkpoint import legacy
from mmpeft.checkpoint.keys import fill_frozen
from mmpeft.checkpoint.late_buffers import make_late_buffers
from mmpeft.checkpoint.manifest import MANIFEST, check_manifest
from mmpeft.checkpoint.safe_load import read_checkpoint
from mmpeft.checkpoint.validation import check_fits
from mmpeft.errors import MissingFileError, UsageError
from mmpeft.injection.site import adapter_parameters

# Of factors in a state dict; torch's own parametrizations have other names.
ADAPTERS = re.compile(r'\.parametrizations\.\w+\.\d+\.')
KEPT = 'The model keeps its own values there.'


@dataclass(frozen=True)
class Source:
    """A checkpoint that is going to be loaded into a model."""

    path: str
    content: dict

    @cached_property
    def manifest(self) -> dict | None:
        """See :func:`manifest_of`."""
        return manifest_of(self.content)


def read_source(path: str | Path) -> Source:
    """Read a checkpoint from a local file, or from an address by mmengine's own loaders.

    Raises:
        UsageError: See :func:`~mmpeft.checkpoint.safe_load.read_checkpoint`.
    """
    path = str(path)
    remote = '://' in path
    return Source(path, _load_checkpoint(path, 'cpu') if remote else read_checkpoint(path))


def manifest_of(checkpoint: Mapping) -> dict | None:
    """What a checkpoint says of its adapters; None if it has none.

    Raises:
        UsageError: What it says is invalid.
    """
    manifest = (checkpoint.get('meta') or {}).get('mmpeft')
    if manifest is not None:
        check = legacy.check_former if legacy.is_former(manifest) else check_manifest
        check({key: value for key, value in manifest.items() if key in MANIFEST})
    return manifest


def unplaced(manifest: Mapping, name: str, config: str | None) -> str:
    """What to say where a checkpoint holds adapters and a config has no PEFTHook."""
    methods = ', '.join(each['method']['type'] for each in manifest['injections'])
    return (
        f'{name} holds adapters ({methods}), and {config} has no PEFTHook to load them. Give the '
        'config that it was trained with, which is in its work directory, or its method by '
        '--method.'
    )


def load_base(
    model: nn.Module,
    source: Source | None,
    base_checkpoint: str | None,
    init_weights: Callable[[], None],
    always_init: bool,
    check_whole: bool = True,
) -> str | None:
    """Put the base into a model that has no adapters yet.

    It is the model's own pretrained weights (``init_cfg``, the backbone's
    checkpoint), over which ``base_checkpoint``, or a source without adapters,
    is loaded.

    Args:
        model: Without adapters.
        source: What is loaded into it afterwards, if anything.
        base_checkpoint: Of the whole plain model.
        init_weights: Puts the model's own weights in.
        always_init: Call it although the source holds the base: training may
            start from a checkpoint of other heads.
        check_whole: Refuse a source without adapters that lacks a part of the
            model, unless ``always_init``.

    Returns:
        The path of the checkpoint that the base is from; None for the model's
        own weights.

    Raises:
        UsageError: A file does not exist, is not a checkpoint, or lacks a part of
            the model.
    """
    manifest = source and source.manifest
    if source is None or manifest is not None:
        path = base_checkpoint or (manifest or {}).get('base_checkpoint')
        base = _read_base(path) if path else None
    else:
        base = source
    if always_init or source is None or not (base is source or manifest.get('holds_base')):
        init_weights()
    if base is None:
        return None
    left_out = load_fitting(model, base.content)
    if left_out and base is source and check_whole and not always_init:
        raise UsageError(_incomplete(source, left_out))
    if left_out and source is None:
        print_log(f'{base.path}: {left_out}. {KEPT}', 'current', logging.WARNING)
    return base.path


def _incomplete(source, left_out):
    if any(ADAPTERS.search(key) for key in source.content.get('state_dict', source.content)):
        return (
            f"{source.path} holds adapters without what describes them (meta['mmpeft']), so it "
            'cannot be loaded. Give the checkpoint as training wrote it, or the adapter file '
            "beside it; published_keys=['meta', 'state_dict'] of CheckpointHook keeps what is "
            'needed.'
        )
    return (
        f'{source.path} holds no adapters, and as the base of this model it is not whole: '
        f'{left_out}. Give the config that belongs to it, such as the one that tools/merge.py '
        'wrote beside a merged checkpoint.'
    )


def complete(
    model: nn.Module, checkpoint: dict, check_base: bool = True, name: str = 'The checkpoint'
) -> None:
    """Check a checkpoint for an adapted model, and fill in what it was saved without.

    Args:
        model: With adapters, on its base.
        checkpoint: With adapters, or of the plain model. Its state dicts are
            changed in place and then have all keys of the model's.
        check_base: Refuse adapters of another base.
        name: What to call the checkpoint in errors.

    Raises:
        UsageError: The adapters do not fit the model.
    """
    manifest = manifest_of(checkpoint)
    state = checkpoint.get('state_dict', checkpoint)
    if manifest is not None:
        check_base = check_base and not manifest.get('holds_base')
        check_fits(model, state, manifest, name, check_base)
    prefixed = all(key.startswith('module.') for key in state)
    make_late_buffers(model, state)
    _fill(model, state, 'module.' if prefixed else '')
    if manifest is None:
        adapters = {id(p) for p in adapter_parameters(model)}
        for key, value in model.state_dict(keep_vars=True).items():
            if id(value) in adapters:
                state.setdefault(key, value.detach())
    if 'ema_state_dict' in checkpoint:
        _fill(model, checkpoint['ema_state_dict'], 'module.')


def load_whole(model: nn.Module, checkpoint: Mapping, name: str) -> None:
    """Load a checkpoint that has all that a model has.

    Args:
        model: With adapters if the checkpoint has them.
        checkpoint: After :func:`complete`.
        name: What to call it in errors.

    Raises:
        UsageError: Tensors are missing or of another shape, or a checkpoint
            with adapters has more than the model.
    """
    misfit = load_fitting(model, checkpoint)
    if misfit:
        raise UsageError(
            f'{name} does not fit this model: {misfit}. Give the config that it was trained with, '
            'heads and classes included.'
        )


def load_fitting(model: nn.Module, checkpoint: Mapping) -> str:
    """Load what fits of a checkpoint into a model; the rest in words, '' if there is none.

    See :func:`load_whole`. Modules that translate the names of earlier
    versions do so.
    """
    given = checkpoint.get('state_dict', checkpoint)
    state = OrderedDict((key.removeprefix('module.'), value) for key, value in given.items())
    state._metadata = getattr(given, '_metadata', None)
    make_late_buffers(model, state)
    theirs, own = _shapes(state), _shapes(model.state_dict())
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # after all that fits was loaded
        if 'size mismatch' not in str(error):
            raise
        missing, unexpected = own, theirs.keys() - own.keys()
    suspects = {*missing, *unexpected} if manifest_of(checkpoint) else {*missing}
    wrong = sorted(
        f'{key}: {theirs.get(key, "none")} in the file, {own.get(key, "none")} in the model'
        for key in suspects
        if theirs.get(key) != own.get(key)
    )
    if not wrong:
        return ''
    shown = '; '.join(wrong[:3]) + ('; ...' if len(wrong) > 3 else '')
    return f'{len(wrong)} tensors are missing or of another shape ({shown})'


def _shapes(state):
    kept = {k: v for k, v in state.items() if not k.endswith('num_batches_tracked')}
    return {key: tuple(value.shape) for key, value in kept.items()}


def _read_base(checkpoint):
    try:
        return read_source(checkpoint)
    except MissingFileError as error:
        raise MissingFileError(
            f'The base checkpoint {checkpoint!r}, which the adapters start from, does not '
            'exist. Put it there, or set default_hooks.peft.base_checkpoint to where it is.'
        ) from error


def _fill(model, state, prefix):
    filled = fill_frozen(model, state, prefix)
    state.clear()
    state.update(filled)
