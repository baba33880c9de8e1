"""Records of long work, one JSON line each, that survive kills and many writers."""

import json
import os
from collections.abc import Mapping
from pathlib import Path


def read_journal(path: str | Path) -> list[dict]:
    """The records of a file of JSON lines; lines that a kill cut off are left out.

    Args:
        path: Of the file, which need not exist.
    """
    path = Path(path)
    records = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # its writer was killed, and its work is done again
        records.append(record)
    return records


def append_record(path: str | Path, record: Mapping) -> None:
    """Add one line to a file, while no other writer on this or another machine does.

    Args:
        path: Of the file; its folder is created if it does not exist.
        record: Plain data; what JSON does not know, such as scalars of numpy, becomes a float.

    Raises:
        OSError: The disk is full or cannot be written to.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record, default=float).encode() + b'\n'
    with path.open('a+b') as file:
        if os.name == 'posix':
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        if file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) and file.read() != b'\n':
            line = b'\n' + line  # behind a line that was cut off
        file.write(line)
