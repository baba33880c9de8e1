"""What a checkpoint is to a model, its base or its adapters, and how both get into the model."""

from collections.abc import Callable
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
    """A checkpoint that is going to be loaded into a model.

    Attributes:
        path: Of the file.
        content: As the file has it.
    """

    path: str
    content: dict

    @cached_property
    def manifest(self) -> dict | None:
        """What it says of its adapters, checked; None if it has none.

        Raises:
            UsageError: What it says is invalid.
        """
        return manifest_of(self.content)

    @property
    def holds_base(self) -> bool:
        """Whether the weights that adapters are on are in it."""
        return self.manifest is None or bool(self.manifest.get('holds_base'))


def fetch_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint from a local file, or from an address by mmengine's own loaders.

    Raises:
        UsageError: See :func:`~mmpeft.checkpoint.safe_load.read_checkpoint`.
    """
    if '://' in str(path):
        return _load_checkpoint(str(path), map_location='cpu')
    return read_checkpoint(path)


def manifest_of(checkpoint: dict) -> dict | None:
    """See :attr:`Source.manifest`."""
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
        source: That is loaded into it afterwards, if any.
        base_checkpoint: Of the whole plain model.
        init_weights: Puts the model's own weights in.
        always_init: Call it although the source holds the base: training may
            start from a checkpoint of other heads.

    Returns:
        The checkpoint that the base is from; None for the model's own weights.

    Raises:
        MissingFileError: A file does not exist.
        UsageError: A file is no checkpoint.
    """
    if source is not None and source.manifest is None:
        checkpoint, content = source.path, source.content
    else:
        of_source = source.manifest.get('base_checkpoint') if source else None
        checkpoint = base_checkpoint or of_source
        content = _read_base(checkpoint) if checkpoint else None
    if always_init or source is None or not source.holds_base:
        init_weights()
    if content is not None:
        _load_checkpoint_to_model(model, content, revise_keys=[(r'^module\.', '')])
    return checkpoint


def complete(
    model: nn.Module, checkpoint: dict, check_base: bool = True, name: str = 'The checkpoint'
) -> None:
    """Check a checkpoint for an adapted model, and fill in what it was saved without.

    Args:
        model: With adapters, on its base.
        checkpoint: With adapters, or of the plain model; changed in place. Its
            state dicts then have all keys of the model's.
        check_base: Refuse adapters of another base.
        name: What to call it in errors.

    Raises:
        UsageError: The adapters do not fit the model.
    """
    manifest = manifest_of(checkpoint)
    state = checkpoint.get('state_dict', checkpoint)
    if manifest is not None:
        check_base = check_base and not manifest.get('holds_base')
        check_fits(model, state, manifest, name, check_base)
    prefixed = all(key.startswith('module.') for key in state)
    _replace(state, fill_frozen(model, state, 'module.' if prefixed else ''))
    if manifest is None:
        adapters = {id(p) for p in adapter_parameters(model)}
        for key, value in model.state_dict(keep_vars=True).items():
            if id(value) in adapters:
                state.setdefault(key, value.detach())
    if 'ema_state_dict' in checkpoint:
        averaged = checkpoint['ema_state_dict']
        _replace(averaged, fill_frozen(model, averaged, 'module.'))


def _read_base(checkpoint):
    try:
        return fetch_checkpoint(checkpoint)
    except MissingFileError as error:
        raise MissingFileError(
            f'The base checkpoint {checkpoint!r}, which the adapters start from, does not '
            'exist. Put it there, or set default_hooks.peft.base_checkpoint to where it is.'
        ) from error


def _replace(state, content):
    state.clear()
    state.update(content)
