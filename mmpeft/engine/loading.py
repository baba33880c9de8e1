"""What a checkpoint is to a model, its base or its adapters, and how both get into the model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mmengine.runner.checkpoint import _load_checkpoint, _load_checkpoint_to_model
from torch import nn

from mmpeft.checkpoint import legacy
from mmpeft.checkpoint.keys import fill_frozen
from mmpeft.checkpoint.manifest import MANIFEST, check_manifest
from mmpeft.checkpoint.safe_load import read_checkpoint
from mmpeft.checkpoint.validation import check_fits
from mmpeft.errors import MissingFileError
from mmpeft.injection.site import adapter_parameters


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


def load_base(
    model: nn.Module,
    source: Source | None,
    base_checkpoint: str | None,
    init_weights: Callable[[], None],
    always_init: bool,
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

    Returns:
        The path of the checkpoint that the base is from; None for the model's
        own weights.

    Raises:
        UsageError: A file does not exist or is no checkpoint.
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
    _load_checkpoint_to_model(model, base.content)
    return base.path


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
    _fill(model, state, 'module.' if prefixed else '')
    if manifest is None:
        adapters = {id(p) for p in adapter_parameters(model)}
        for key, value in model.state_dict(keep_vars=True).items():
            if id(value) in adapters:
                state.setdefault(key, value.detach())
    if 'ema_state_dict' in checkpoint:
        _fill(model, checkpoint['ema_state_dict'], 'module.')


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
