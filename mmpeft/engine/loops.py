"""The loops of a Runner, with what is said where their datasets cannot be built."""

import json
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config
from mmengine.runner import Runner

from mmpeft.errors import DamagedFileError, UsageError, listed

from .class_count import SHOWN
from .config import dicts_in
from .data_check import named_paths
from .datasets import category_names


def build_loops(runner: Runner, splits: Sequence[str]) -> None:
    """Build loops, and so datasets and metrics.

    Args:
        runner: Keeps the loops.
        splits: Of ``'train'``, ``'val'``, ``'test'``.

    Raises:
        DamagedFileError: An annotation file is not JSON, or empty.
        UsageError: A dataset has no image.
    """
    for split in splits:
        try:
            getattr(runner, f'{split}_loop')
        except ValueError as error:  # the one of JSON is one
            _check_json(runner.cfg, split)
            if 'need at least one array to concatenate' not in str(error):  # BaseDataset's
                raise
            raise UsageError(_no_image(runner.cfg, split)) from error


def _check_json(cfg: Config, split):
    for key, path in named_paths(cfg, [split]):
        if path.endswith('.json') and Path(path).is_file():
            try:
                json.loads(Path(path).read_bytes())
            except ValueError as error:
                fault = error if Path(path).stat().st_size else 'it is empty'
                raise DamagedFileError(
                    f'The annotation file {path} ({key}) is not JSON: {fault}. Write or copy it '
                    'again.'
                ) from error


def _no_image(cfg: Config, split):
    key = f'{split}_dataloader'
    named = [found for found in named_paths(cfg, [split]) if found[0].startswith(key)]
    read = ' and '.join(f'{path} ({key})' for key, path in named[:4])
    metainfo = (node.get('metainfo') or {} for node in dicts_in(cfg[key]))
    classes = next((each['classes'] for each in metainfo if each.get('classes')), None)
    text = f'The dataset of {key} has no image. It reads {read}'
    text += f', for the classes {listed(list(classes), SHOWN)}.' if classes else '.'
    for path in [path for _, path in named if path.endswith('.json')][:1]:
        text += f' {path} has the categories {listed(category_names(path), SHOWN)}.'
    return (
        f'{text} Images without an instance of the classes are left out: correct '
        'metainfo=dict(classes=...), the paths or the file.'
    )
