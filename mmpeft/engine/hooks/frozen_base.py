"""Which weights the adapters start from, and loading them before injection."""

from dataclasses import dataclass

from mmengine.runner import Runner
from mmengine.runner.checkpoint import _load_checkpoint_to_model

from mmpeft.errors import MissingFileError, UsageError

from .resume import fetch_checkpoint, newest_checkpoint


@dataclass(frozen=True)
class Base:
    """Where the frozen weights of a run come from.

    Attributes:
        checkpoint: Of the whole plain model; None for the model's own
            pretrained weights.
        manifest: What the checkpoint that the run loads afterwards says of its
            adapters; None if it has none.
    """

    checkpoint: str | None
    manifest: dict | None


def load_base(runner: Runner, checkpoint: str | None, training: bool) -> Base:
    """Put the base into ``runner.model``, which has no adapters yet.

    It is the model's own pretrained weights (``init_cfg``, the backbone's
    checkpoint), over which ``checkpoint``, or a ``load_from`` without
    adapters, is loaded.

    Args:
        runner: Its model is unwrapped.
        checkpoint: That the hook was given.
        training: Whether the run trains.

    Raises:
        MissingFileError: A file does not exist.
        UsageError: A checkpoint without adapters is to be resumed.
    """
    source, pending = _pending_checkpoint(runner)
    description = description_of(pending or {})
    plain = pending is not None and description is None
    if plain and runner._resume:
        raise UsageError(
            f'{source!r} holds no adapters, so there is no adapter training to resume. To '
            'start from its weights, set load_from to it and leave --resume away.'
        )
    holds_base = plain or (description or {}).get('holds_base')
    checkpoint = source if plain else checkpoint or (description or {}).get('base_checkpoint')
    if training or not holds_base:
        runner._init_model_weights()
    if plain and not training:
        runner.logger.warning(
            f'{source!r} holds no adapters. It is taken as the base, and the adapters are '
            'as they start.'
        )
    if checkpoint is not None:
        content = pending if plain else _read_base(checkpoint)
        _load_checkpoint_to_model(runner.model, content, revise_keys=[(r'^module\.', '')])
    return Base(checkpoint, description)


def description_of(checkpoint: dict) -> dict | None:
    """What a checkpoint says of its adapters; None if it has none."""
    return (checkpoint.get('meta') or {}).get('mmpeft')


def _read_base(checkpoint):
    try:
        return fetch_checkpoint(checkpoint)
    except MissingFileError as error:
        raise MissingFileError(
            f'The base checkpoint {checkpoint!r}, which the adapters start from, does not '
            'exist. Put it there, or set default_hooks.peft.base_checkpoint to where it is.'
        ) from error


def _pending_checkpoint(runner):
    """What the Runner is going to load; where it is to find the newest, that is found here."""
    if runner._has_loaded:
        return None, None
    if runner._load_from is None and runner._resume:
        newest, checkpoint = newest_checkpoint(runner)
        runner._load_from = newest
        return newest, checkpoint
    if runner._load_from is None:
        return None, None
    return str(runner._load_from), fetch_checkpoint(runner._load_from)
