"""Files that appear complete or not at all, however their writer ends.

A file is written under a temporary name, flushed to the disk and renamed; then
its folder is flushed. A reader in between, or after a crash, finds the file
that was there before.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import Tensor

from mmpeft.errors import UnwrittenFileError, UsageError

# What torch.save says in a RuntimeError when it cannot write.
TORCH_SAVE = re.compile('PytorchStreamWriter|inline_container')


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """An empty file beside a path, which replaces it when the block ends without an error.

    Temporary names are ``.NAME.PROCESS.tmp``. Those that killed writers of
    the same name left behind are removed. The file's mode follows the umask;
    its folder is created if it does not exist.

    Raises:
        UnwrittenFileError: The disk is full or cannot be written to. A file
            that was at the path is unchanged.
    """
    path = Path(path)
    existed = path.exists()
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors puts a file of mode 0600 in its place
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not TORCH_SAVE.search(str(error)):
            raise
        # torch and safetensors give no number of the error.
        full = getattr(error, 'errno', None) in (None, errno.ENOSPC)
        raise UnwrittenFileError(
            f'{str(path)!r} could not be written: {error}.{_free(path) if full else ""}'
            + (' The file that was there before is unchanged.' if existed else '')
        ) from error
    finally:
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)


def refuse_existing(*paths: Path, option: str = '--overwrite') -> None:
    """Raise UsageError if one of the files exists, and name the option that replaces them."""
    taken = [str(path) for path in paths if path.exists()]
    if taken:
        exist = 'exist' if len(taken) > 1 else 'exists'
        raise UsageError(f'{" and ".join(taken)} {exist} already. Give another name, or {option}.')


def write_tensors(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file in place; for files that must be complete within :func:`replacing`.

    Equal tensors and metadata give equal bytes. The tensors are contiguous, on the CPU, and share
    no memory.

    Raises:
        OSError: The disk is full or cannot be written to.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(state), path, dict(metadata))
    except SafetensorError as error:
        raise OSError(error) from error
    _sort_metadata(path)


def _sort_metadata(path):
    """Put the metadata of a safetensors file, whose order is random, in the order of its keys.

    The header is its length in 8 bytes and a JSON object, padded with spaces
    (https://huggingface.co/docs/safetensors#format).
    """
    with path.open('r+b') as file:
        size = int.from_bytes(file.read(8), 'little')
        header = json.loads(file.read(size))
        header['__metadata__'] = dict(sorted(header['__metadata__'].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(',', ':')).encode()
        file.seek(8)
        file.write(text.ljust(size))


def _flush(path):
    """Bring a file's content, or the names in a folder, to the disk."""
    if path.is_dir() and os.name != 'posix':
        return  # only there can a folder be opened
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_leftovers(path):
    for name in os.listdir(path.parent):
        match = re.fullmatch(rf'\.{re.escape(path.name)}\.(\d+)\.tmp', name)
        if match and not _is_running(int(match[1])):
            path.with_name(name).unlink(missing_ok=True)


def _is_running(process):
    if os.name != 'posix':
        return True  # elsewhere signal 0 would end the process
    try:
        with suppress(PermissionError):  # of another user
            os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    return True


def _free(path):
    if not path.parent.is_dir():
        return ''
    return f' {shutil.disk_usage(path.parent).free / 2**20:,.1f} MiB are free there.'
