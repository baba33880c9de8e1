"""Whether the files that a config's datasets name exist."""

from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config


def missing_data(cfg: Config, splits: Sequence[str]) -> list[tuple[str, str]]:
    """Key and path of what the datasets and metrics of a config name and the disk lacks.

    Each path comes once. Remote files and other storage backends are not looked for.

    Args:
        cfg: With ``<split>_dataloader`` and ``<split>_evaluator``.
        splits: Of ``'train'``, ``'val'``, ``'test'``.
    """
    named = []
    for split in splits:
        loader = cfg.get(f'{split}_dataloader')
        if isinstance(loader, dict) and isinstance(loader.get('dataset'), dict):
            named += _dataset_paths(loader.dataset, f'{split}_dataloader.dataset')
        named += _evaluator_paths(cfg.get(f'{split}_evaluator'), f'{split}_evaluator')
    missing = {}
    for key, path in named:
        if not Path(path).exists():
            missing.setdefault(path, key)
    return [(key, path) for path, key in missing.items()]


def describe(missing: Sequence[tuple[str, str]]) -> str:
    """One paragraph about what :func:`missing_data` found, and what to do."""
    shown = '; '.join(f'{path} ({key})' for key, path in missing[:4])
    more = f' and {len(missing) - 4} more' if len(missing) > 4 else ''
    key, path = missing[0]
    parts = Path(path).parts
    top = Path(*parts[: max(1, min(2, len(parts) - 1))])
    return (
        f'the data is not where the config says, seen from {Path.cwd()}: {shown}{more}. Put it '
        f'there, link it (ln -s /where/it/is {top}), or inherit the config and set '
        f'{key.rsplit(".", 1)[0]}.data_root and similar keys.'
    )


def _dataset_paths(dataset, key):
    inner = dataset.get('dataset')
    if isinstance(inner, dict):
        return _dataset_paths(inner, f'{key}.dataset')
    if isinstance(dataset.get('datasets'), (list, tuple)):
        return [
            found
            for i, each in enumerate(dataset.datasets)
            for found in _dataset_paths(each, f'{key}.datasets.{i}')
        ]
    root = dataset.get('data_root') or ''
    if dataset.get('backend_args') or '://' in root:
        return []
    prefix = dataset.get('data_prefix') or {}
    prefix = {'': prefix} if isinstance(prefix, str) else prefix
    named = [('ann_file', dataset.get('ann_file'))]
    named += [(f'data_prefix.{name}'.rstrip('.'), value) for name, value in prefix.items()]
    # As in mmengine, a relative name is below data_root, and an absolute one stands alone.
    return [(f'{key}.{name}', str(Path(root) / path)) for name, path in named if _is_local(path)]


def _evaluator_paths(evaluator, key):
    several = isinstance(evaluator, (list, tuple))
    return [
        (f'{key}.{i}.ann_file' if several else f'{key}.ann_file', metric['ann_file'])
        for i, metric in enumerate(evaluator if several else [evaluator])
        if isinstance(metric, dict) and not metric.get('backend_args')
        if _is_local(metric.get('ann_file'))
    ]


def _is_local(path):
    return isinstance(path, str) and path != '' and '://' not in path
