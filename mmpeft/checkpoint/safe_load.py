"""Reading checkpoints without executing anything in them.

mmengine reads a checkpoint with ``weights_only=True`` and, if that fails,
again without it, which runs any code that the file contains. A checkpoint that
was read here first never gets that far.
"""

import re
import zipfile
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.optim import OneCycleParamScheduler
from torch.utils._pytree import tree_leaves

from mmpeft.errors import DamagedFileError, MissingFileError, UsageError

from .file_kind import checkpoint_instead, is_safetensors

FUNCTIONS = {
    HistoryBuffer: ('min', 'max', 'current', 'mean'),
    OneCycleParamScheduler: ('_annealing_cos', '_annealing_linear'),
}
"""Functions that mmengine's objects in a checkpoint refer to."""


def _function(kind, name):
    """Replaces ``getattr``, by which a pickle names a function of a class."""
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
        for core in ('core', '_core')  # the names of numpy 1 and 2
    ),
]
"""What a checkpoint of mmengine may contain in addition to tensors and plain data."""


def read_checkpoint(path: str | Path) -> dict:
    """Read a local checkpoint; nothing in it is executed.

    Tensors are read from the disk when they are used.

    Raises:
        DamagedFileError: The file is truncated or corrupted, or
            ``torch.save`` did not write it.
        UsageError: It contains objects that can only be restored by running
            code, is not a checkpoint, or holds the parts of several processes.
        MissingFileError: There is no such file.
    """
    path = Path(path)
    if path.is_dir():
        raise UsageError(
            f'{str(path)!r} is a folder, as FSDP and DeepSpeed write one with the parts of each '
            'process, and not one file. Make a file of it: python -m '
            'torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE, or of '
            "DeepSpeed's by its zero_to_fp32.py."
        )
    if not path.is_file():
        raise MissingFileError(f'The checkpoint {str(path)!r} does not exist.')
    if is_safetensors(path):
        raise UsageError(checkpoint_instead(path))
    _check_sums(path)
    checkpoint = _load(path)
    if not isinstance(checkpoint, dict):
        raise UsageError(
            f'{str(path)!r} contains a {type(checkpoint).__name__}, not the dict of a checkpoint.'
        )
    if any(hasattr(leaf, 'to_local') for leaf in tree_leaves(checkpoint)):
        raise UsageError(
            f'{str(path)!r} holds the parts that one process had of a sharded model (DTensor). '
            'Save the whole tensors, as training by tools/train.py --shard and '
            'torch.distributed.checkpoint.state_dict do (full_state_dict=True).'
        )
    return checkpoint


def saved_at(path: str | Path) -> tuple[str, int]:
    """Time and iteration at which a checkpoint says it was saved; ``'~'`` if it cannot be read."""
    try:
        meta = _load(Path(path))['meta']
        return str(meta['time']), int(meta['iter'])
    except (UsageError, KeyError, TypeError, ValueError):
        return '~', 0


def _load(path):
    zipped = zipfile.is_zipfile(path)
    try:
        with torch.serialization.safe_globals(ALLOWED):
            return torch.load(path, map_location='cpu', weights_only=True, mmap=zipped)
    except Exception as error:  # its type depends on the bytes of the file
        named = isinstance(error, UnpicklingError) and re.search(r'GLOBAL ([\w.]+)', str(error))
        if named:
            raise UsageError(
                f'{str(path)!r} contains {named[1]}, which can only be restored by running code '
                'from the file. If you trust the file, save its state_dict anew, or allow the '
                'type with torch.serialization.add_safe_globals in a module of custom_imports.'
            ) from error
        raise DamagedFileError(
            f'{str(path)!r} is damaged, or torch.save did not write it. Give a checkpoint (.pth) '
            'that training saved.'
        ) from error


def _check_sums(path):
    """Compare the checksums that torch writes and does not read, unless they are switched off."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = any(entry.CRC for entry in archive.infolist()) and archive.testzip()
    except Exception as error:  # its type depends on the bytes of the file
        raise DamagedFileError(f'{str(path)!r} is damaged: {error}.') from error
    if wrong:
        raise DamagedFileError(f'{str(path)!r} is damaged: the checksum of {wrong} is wrong.')
