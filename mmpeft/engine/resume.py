"""Which checkpoint a run starts or continues from."""

import glob
from pathlib import Path

from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner, find_latest_checkpoint

from mmpeft.checkpoint.safe_load import saved_at
from mmpeft.errors import DamagedFileError, MissingFileError, UsageError

from .loading import Source, read_source

BESIDE = ('.safetensors', '.json')
"""Suffixes of the adapter files that lie beside checkpoints."""


def pending_source(runner: Runner) -> Source | None:
    """The checkpoint that a Runner is going to load or resume from; None if there is none.

    Where the Runner is to find the newest, it is found here and set.

    Raises:
        UsageError: A file does not exist or is not a checkpoint, or all that there
            are are damaged.
    """
    if runner._has_loaded:
        return None
    if runner._load_from is not None:
        return read_source(runner._load_from)
    source = _newest(runner) if runner._resume else None
    runner._load_from = source and source.path
    return source


def _newest(runner):
    """The newest intact checkpoint of a run.

    mmengine's ``last_checkpoint`` may be incomplete after a crash, or name a
    damaged file. So all checkpoints are looked at, in the order of the time
    that they say they were saved.
    """
    last = find_latest_checkpoint(runner.work_dir)
    if last and '://' in last:
        return read_source(last)
    damaged = []
    candidates = {path: (*saved_at(path), path.name) for path in _candidates(runner, last)}
    for path in sorted(candidates, key=candidates.get, reverse=True):
        try:
            source = read_source(path)
        except DamagedFileError as error:
            damaged.append(str(path))
            runner.logger.warning(f'{error} It is skipped.')
            continue
        if 'message_hub' in source.content:
            return source
    if damaged:
        raise UsageError(
            f'There is no intact checkpoint to resume from: {", ".join(damaged)} are damaged. '
            'Move them away to start from the beginning.'
        )
    if last:
        raise MissingFileError(
            f'{runner.work_dir}/last_checkpoint names {last!r}, which does not exist, and there '
            'is no other checkpoint to resume from. Set load_from to its new place.'
        )
    return None


def _candidates(runner, last):
    found = {Path(last).absolute()} if last and Path(last).is_file() else set()
    for hook in runner.hooks:
        if isinstance(hook, CheckpointHook):
            folder = Path(runner.work_dir)
            if hook.out_dir not in (None, runner.work_dir):
                folder = Path(hook.out_dir) / folder.name
            pattern = glob.escape(hook.filename_tmpl).format('*')
            found.update(path.absolute() for path in folder.glob(pattern))
    return {path for path in found if path.suffix not in BESIDE}
