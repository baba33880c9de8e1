"""Checkpoints, read without running what is in them, and the newest that is whole.

mmengine reads a checkpoint with ``weights_only=True`` and, where that fails,
again without it, which runs whatever the file says. What is read here first
never comes to that.
"""

import glob
import re
import zipfile
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.hooks import CheckpointHook
from mmengine.logging import HistoryBuffer
from mmengine.optim import OneCycleParamScheduler
from mmengine.runner import Runner, find_latest_checkpoint
from mmengine.runner.checkpoint import _load_checkpoint

from mmpeft.errors import DamagedFileError, MissingFileError, UsageError

FUNCTIONS = {
    HistoryBuffer: ('min', 'max', 'current', 'mean'),
    OneCycleParamScheduler: ('_annealing_cos', '_annealing_linear'),
}
"""Functions that mmengine's own objects refer to in a checkpoint."""


def _function(kind, name):
    """Stands for ``getattr``, by which a pickle names a function of a class."""
    if name not in FUNCTIONS.get(kind, ()):
        raise UnpicklingError(f'GLOBAL {kind}.{name}')
    return getattr(kind, name)


NUMBERS = (bool, np.uint8, np.uint32, np.int32, np.int64, np.float32, np.float64)
ALLOWED = [
    *FUNCTIONS,
    ConfigDict,
    np.ndarray,
    np.dtype,
    *{type(np.dtype(number)) for number in NUMBERS},
    (_function, 'builtins.getattr'),
    *(
        (value.__reduce__()[0], f'numpy.{core}.multiarray.{name}')
        for name, value in dict(_reconstruct=np.zeros(1), scalar=np.float64(0)).items()
        for core in ('core', '_core')  # as numpy 1 and 2 say
    ),
]
"""What a checkpoint of mmengine may hold beside tensors and plain data."""


def read_checkpoint(path) -> dict:
    """Read a checkpoint; nothing in it is executed.

    Tensors of a local file are read from the disk when they are used.

    Args:
        path: A local file, or an address, which mmengine's own loaders read
            in their own way.

    Raises:
        DamagedFileError: The file is not whole.
        UsageError: It holds what only running code can bring back, or is no
            checkpoint.
        MissingFileError: There is no such file.
    """
    if '://' in str(path):
        return _load_checkpoint(str(path), map_location='cpu')
    if not Path(path).is_file():
        raise MissingFileError(f'The checkpoint {str(path)!r} does not exist.')
    _check_sums(path)
    checkpoint = _load(path)
    if not isinstance(checkpoint, dict):
        raise UsageError(f'{str(path)!r} holds a {type(checkpoint).__name__}, no checkpoint.')
    return checkpoint


def newest_checkpoint(runner: Runner) -> tuple[str | None, dict | None]:
    """The newest checkpoint of a run that is whole.

    ``last_checkpoint``, which mmengine keeps, can be torn by a crash, or name
    a file that is. Checkpoints say themselves when they were saved.

    Args:
        runner: Knows its ``work_dir`` and where checkpoints go.

    Returns:
        Its path and content; None and None if there are no checkpoints.

    Raises:
        UsageError: There are, and none is whole.
        MissingFileError: There should be one.
    """
    last = find_latest_checkpoint(runner.work_dir)
    if last and '://' in last:
        return last, read_checkpoint(last)
    damaged = []
    for path in sorted(_candidates(runner, last), key=_saved_at, reverse=True):
        try:
            checkpoint = read_checkpoint(path)
        except DamagedFileError as error:
            damaged.append(str(path))
            runner.logger.warning(f'{error} It is left out.')
            continue
        if 'message_hub' in checkpoint:
            return str(path), checkpoint
    if damaged:
        raise UsageError(
            f'There is no whole checkpoint to resume from: {", ".join(damaged)} are damaged. '
            'Move them away to start anew.'
        )
    if last:
        raise MissingFileError(
            f'{runner.work_dir}/last_checkpoint names {last!r}, which does not exist, and there '
            'is no other checkpoint to resume from. Set load_from to where it is.'
        )
    return None, None


def _candidates(runner, last):
    found = {Path(last).absolute()} if last and Path(last).is_file() else set()
    for hook in runner.hooks:
        if isinstance(hook, CheckpointHook):
            folder = Path(runner.work_dir)
            if hook.out_dir not in (None, runner.work_dir):
                folder = Path(hook.out_dir) / folder.name
            pattern = glob.escape(hook.filename_tmpl).format('*')
            found.update(path.absolute() for path in folder.glob(pattern))
    return found


def _saved_at(path):
    try:
        meta = _load(path)['meta']
        return str(meta['time']), int(meta['iter']), path.name
    except (UsageError, KeyError, TypeError, ValueError):
        return '~', 0, path.name  # looked at first


def _load(path):
    try:
        with torch.serialization.safe_globals(ALLOWED):
            return torch.load(
                path, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except Exception as error:  # what is raised depends on the bytes of the file
        named = isinstance(error, UnpicklingError) and re.search(r'GLOBAL ([\w.]+)', str(error))
        if not named:
            raise DamagedFileError(_not_whole(path, str(error).split('\n')[0])) from error
        raise UsageError(
            f'{str(path)!r} holds {named[1]}, which only running code from the file can bring '
            'back. If you know where the file comes from, save its state_dict anew, or allow '
            'what it holds: torch.serialization.add_safe_globals in a module of custom_imports.'
        ) from error


def _check_sums(path):
    """torch writes checksums (or zeros, if told so) and does not compare them."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = any(entry.CRC for entry in archive.infolist()) and archive.testzip()
    except Exception as error:  # what is raised depends on the bytes of the file
        raise DamagedFileError(_not_whole(path, error)) from error
    if wrong:
        raise DamagedFileError(_not_whole(path, f'the checksum of {wrong} is wrong'))


def _not_whole(path, reason):
    return f'{str(path)!r} is no whole checkpoint: {reason}.'
