"""Weights that are published in several files, with an index."""

import json
from pathlib import Path

from mmpeft.errors import MissingFileError, UsageError


def shards_of(index: Path) -> list[Path]:
    """The files beside an index of transformers (``*.index.json``) that it names, sorted.

    Raises:
        UsageError: It is not such an index.
        MissingFileError: Some of the files are missing.
    """
    try:
        names = sorted(set(json.loads(index.read_text())['weight_map'].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f'{index} is not an index of safetensors shards: {error!r}.') from error
    files = [index.parent / Path(name).name for name in names]
    absent = [path.name for path in files if not path.is_file()]
    if absent:
        raise MissingFileError(
            f'{len(absent)} of the {len(files)} shards that {index} names are missing, such as '
            f'{absent[0]}. Download them into {index.parent}.'
        )
    return files
