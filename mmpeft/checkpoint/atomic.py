"""Files that appear whole or not at all, whatever stops their writer.

A file is written under a temporary name, brought to the disk, and renamed; the
folder is brought to the disk after it. A reader that comes in between, or
after a crash, finds the file that was there before.
"""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from mmpeft.errors import UnwrittenFileError


@contextmanager
def replacing(path: Path):
    """A temporary path beside a path, which takes its place when all went well.

    Temporary names are ``.NAME.PROCESS.tmp``. Those that killed writers of
    the same name left behind are removed.

    Args:
        path: Its folder is made if there is none.

    Yields:
        Where to write.

    Raises:
        UnwrittenFileError: The disk is full, or may not be written to. The
            file is as it was before.
    """
    path = Path(path)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except (OSError, RuntimeError) as error:  # the latter is torch.save's
        raise UnwrittenFileError(
            f'{str(path)!r} could not be written: {error}.{_free(path)} What was there before is '
            'as it was.'
        ) from error
    finally:
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)


def _sync(path):
    """Bring a file's content, or the names in a folder, to the disk."""
    if path.is_dir() and os.name != 'posix':
        return  # only there can a folder be opened
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_leftovers(path):
    start, end = f'.{path.name}.', '.tmp'
    for name in os.listdir(path.parent):
        if name.startswith(start) and name.endswith(end):
            process = name[len(start) : -len(end)]
            if process.isdecimal() and not _runs(int(process)):
                path.with_name(name).unlink(missing_ok=True)


def _runs(process):
    if os.name != 'posix':
        return True  # signal 0 is a question there alone
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _free(path):
    if not path.parent.is_dir():
        return ''
    return f' {shutil.disk_usage(path.parent).free / 2**20:,.1f} MiB are free there.'
