"""Whether the files that a config's datasets name are there."""

from pathlib import Path

from mmengine.config import Config


def missing_data(cfg: Config, splits) -> list[tuple[str, str]]:
    """What the datasets and metrics of a config name and the disk lacks.

    Remote files and other storage backends are not looked for.

    Args:
        cfg (Config): With ``<split>_dataloader`` and ``<split>_evaluator``.
        splits (Sequence[str]): Of ``'train'``, ``'val'``, ``'test'``.

    Returns:
        list[tuple[str, str]]: Key in the config and path, in the config's
        order, each path once.
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


def describe(missing) -> str:
    """One paragraph about :func:`missing_data`'s answer: what, where, what to write."""
    shown = '; '.join(f'{path} ({key})' for key, path in missing[:4])
    more = f' and {len(missing) - 4} more' if len(missing) > 4 else ''
    key, path = missing[0]
    return (
        f'the data is not where the config says, seen from {Path.cwd()}: {shown}{more}. '
        f'Put it there, link it (ln -s /where/it/is {_top(path)}), or inherit the config and set '
        f'{key.rsplit(".", 1)[0]}.data_root and its like to where it is.'
    )


def _top(path):
    parts = Path(path).parts
    return str(Path(*parts[: max(1, min(2, len(parts) - 1))]))


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
    if dataset.get('backend_args'):
        return []
    root = dataset.get('data_root') or ''
    prefix = dataset.get('data_prefix') or {}
    prefix = {'': prefix} if isinstance(prefix, str) else prefix
    named = [('ann_file', dataset.get('ann_file'))]
    named += [(f'data_prefix.{name}'.rstrip('.'), value) for name, value in prefix.items()]
    # As mmengine does: a relative name is below data_root, an absolute one stands alone.
    remote = '://' in root
    return [
        (f'{key}.{name}', str(Path(root) / value))
        for name, value in named
        if isinstance(value, str) and value and not remote and '://' not in value
    ]


def _evaluator_paths(evaluator, key):
    several = isinstance(evaluator, (list, tuple))
    metrics = evaluator if several else [evaluator]
    return [
        (f'{key}.{i}.ann_file' if several else f'{key}.ann_file', metric['ann_file'])
        for i, metric in enumerate(metrics)
        if isinstance(metric, dict)
        and isinstance(metric.get('ann_file'), str)
        and metric['ann_file']
        and '://' not in metric['ann_file']
        and not metric.get('backend_args')
    ]
