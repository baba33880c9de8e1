"""Whether the files that a config's datasets name exist."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from mmengine.config import Config

from mmpeft.errors import MissingFileError

SOURCES = {
    'vtab-1k|train800|val200': 'VTAB-1k in this layout is made by data/vtab-source/get_vtab1k.py '
    'of https://github.com/ZhangYuanhan-AI/NOAH, which downloads the data sets.'
}
"""Where data that is missing comes from, by a pattern of its path."""


def missing_data(cfg: Config, splits: Sequence[str]) -> list[tuple[str, str]]:
    """Key and path of what the datasets and metrics of a config name and the disk lacks.

    Each path comes once. Remote files and other storage backends are not looked for.

    Args:
        cfg: With ``<split>_dataloader`` and ``<split>_evaluator``.
        splits: Of ``'train'``, ``'val'``, ``'test'``.
    """
    missing = {}
    for key, path in named_paths(cfg, splits):
        if not Path(path).exists():
            missing.setdefault(path, key)
    return [(key, path) for path, key in missing.items()]


def check_data(cfg: Config, splits: Sequence[str]) -> None:
    """Refuse a config whose data is missing; the arguments are those of :func:`missing_data`.

    Raises:
        MissingFileError: It says in one paragraph what is missing and what to do.
    """
    missing = missing_data(cfg, splits)
    if not missing:
        return
    shown = '; '.join(f'{path} ({key})' for key, path in missing[:4])
    more = f' and {len(missing) - 4} more' if len(missing) > 4 else ''
    key, path = missing[0]
    dataset = re.sub(r'\.(ann_file|data_prefix.*)$', '', key)
    root = f'{dataset}.data_root or ' if '_dataloader.' in key else ''  # metrics have none
    folders = [*reversed(Path(path).parents), Path(path)]
    top = next((folder for folder in folders if not folder.exists()), path)
    raise MissingFileError(
        f'the data is not where the config says, seen from {Path.cwd()}: {shown}{more}. Put it '
        f'there, link it (ln -s /where/it/is {top}), or inherit the config and set '
        f'{root}{key}, and similar keys.'
        + ''.join(f' {text}' for pattern, text in SOURCES.items() if re.search(pattern, path))
    )


def named_paths(cfg: Config, splits: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Key and path of what the datasets and metrics of a config name; see :func:`missing_data`."""
    for key in [f'{split}_{part}' for split in splits for part in ('dataloader', 'evaluator')]:
        yield from _paths(cfg.get(key), key)


def _paths(node, key) -> Iterator[tuple[str, str]]:
    """Key and path of each file that a dataset or metric names, and those inside of it."""
    if isinstance(node, (list, tuple)):
        for i, each in enumerate(node):
            yield from _paths(each, f'{key}.{i}')
    if not isinstance(node, dict):
        return
    for inner in ('dataset', 'datasets'):
        yield from _paths(node.get(inner), f'{key}.{inner}')
    prefix = node.get('data_prefix') or {}
    prefix = {'': prefix} if isinstance(prefix, str) else prefix
    named = {f'data_prefix.{name}'.rstrip('.'): path for name, path in prefix.items()}
    for name, path in (dict(ann_file=node.get('ann_file')) | named).items():
        if isinstance(path, str) and path and not node.get('backend_args'):
            # As in mmengine, a relative name is below data_root, and an absolute one stands alone.
            path = os.path.join(node.get('data_root') or '', path)
            if '://' not in path:
                yield f'{key}.{name}', str(Path(path))
