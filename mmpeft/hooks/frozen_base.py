"""Which weights the adapters start from, and loading them before injection."""

from dataclasses import dataclass
from pathlib import Path

from mmengine.runner import Runner, find_latest_checkpoint, load_checkpoint
from mmengine.runner.checkpoint import _load_checkpoint

from mmpeft.errors import MissingFileError, UsageError


@dataclass(frozen=True)
class Base:
    """Where the frozen weights of a run come from.

    Attributes:
        checkpoint: Of the whole plain model; None for the model's own
            pretrained weights.
        adapters_follow: Whether the run loads adapters afterwards.
    """

    checkpoint: str | None
    adapters_follow: bool


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
        if '://' not in checkpoint and not Path(checkpoint).is_file():
            raise MissingFileError(
                f'The base checkpoint {checkpoint!r}, which the adapters start from, does not '
                'exist. Put it there, or set default_hooks.peft.base_checkpoint to where it is.'
            )
        load_checkpoint(
            runner.model, checkpoint, map_location='cpu', revise_keys=[(r'^module\.', '')]
        )
    return Base(checkpoint, adapters_follow=description is not None)


def description_of(checkpoint: dict) -> dict | None:
    """What a checkpoint says of its adapters; None if it has none."""
    return (checkpoint.get('meta') or {}).get('mmpeft')


def _pending_checkpoint(runner):
    if runner._has_loaded:
        return None, None
    source = runner._load_from
    if source is None and runner._resume:
        source = find_latest_checkpoint(runner.work_dir)
    if source is None:
        return None, None
    if '://' not in str(source) and not Path(source).is_file():
        raise MissingFileError(f'The checkpoint {str(source)!r} does not exist.')
    return str(source), _load_checkpoint(str(source), map_location='cpu')
