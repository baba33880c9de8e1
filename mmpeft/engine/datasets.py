"""Whether the classes and labels of a run's datasets are what it can train on.

A dataset that does not know a class leaves out what is labelled with it, and says nothing.
"""

from collections.abc import Iterator
from typing import Any

from mmengine.dataset import BaseDataset
from mmengine.fileio import load
from mmengine.runner import BaseLoop, Runner
from torch import nn

from mmpeft.errors import UsageError, listed, suggest

from .class_count import SHOWN, check_class_count


def check_datasets(runner: Runner, model: nn.Module) -> None:
    """Look at the datasets of the loops that a Runner has built.

    Args:
        runner: Before it runs.
        model: Of the Runner, without what wraps it.

    Raises:
        UsageError: Classes are not a list of names, an annotation file lacks some of them, no
            image for training has an instance, or a head has too few classes.
    """
    for split in ('train', 'val', 'test'):
        loop = getattr(runner, f'_{split}_loop', None)
        dataset = getattr(getattr(loop, 'dataloader', None), 'dataset', None)
        if not isinstance(loop, BaseLoop) or dataset is None:
            continue
        key = f'{split}_dataloader.dataset'
        for path, inner in _innermost(dataset, key):
            _check_names(path, inner)
        if split == 'train':
            if _has_no_instance(dataset):
                raise UsageError(
                    f'None of the {len(dataset)} images of {key} has an instance of its classes '
                    f'({listed(classes_of(dataset), SHOWN)}), so there is nothing to learn. '
                    f'{_origin(dataset, key)}'
                )
            check_class_count(runner, model, dataset, classes_of(dataset))


def classes_of(dataset: Any) -> tuple[str, ...]:
    """The names of a dataset's classes, also of a wrapper; () if it has none."""
    return tuple((getattr(dataset, 'metainfo', None) or {}).get('classes') or ())


def category_names(ann_file: str, backend_args: dict | None = None) -> list[str]:
    """The names of the categories in a file in COCO's format."""
    return [str(each['name']) for each in load(ann_file, backend_args=backend_args)['categories']]


def _innermost(dataset, path) -> Iterator[tuple[str, Any]]:
    """The datasets in wrappers, with their keys in the config."""
    if (inner := getattr(dataset, 'dataset', None)) is not None:
        yield from _innermost(inner, f'{path}.dataset')
    elif inner := getattr(dataset, 'datasets', None):
        for i, each in enumerate(inner):
            yield from _innermost(each, f'{path}.datasets.{i}')
    else:
        yield path, dataset


def _check_names(path, dataset):
    written = (getattr(dataset, 'metainfo', None) or {}).get('classes')
    if isinstance(written, str):
        raise UsageError(
            f'{path}.metainfo.classes is the text {written!r}, whose letters would be the classes. '
            f'It is a tuple of names, and one with a single name has a comma: ({written!r},).'
        )
    found = getattr(dataset, 'cat_ids', None)
    if found is None or len(found) >= len(written or ()):
        return
    known = category_names(dataset.ann_file, getattr(dataset, 'backend_args', None))
    lost = [name for name in written if name not in known]
    if lost:
        raise UsageError(
            f'{path}: its annotation file {dataset.ann_file} has no category '
            f'{listed(lost, SHOWN)}, which its classes name. The file has '
            f'{listed(known, SHOWN)}. {suggest(lost[0], known, otherwise="")} Set '
            f'{path}.metainfo.classes to names of the file, letter by letter.'.replace('  ', ' ')
        )


def _has_no_instance(dataset):
    """Whether all images lack instances; False for tasks without them. Stops at the first."""
    for _, inner in _innermost(dataset, ''):
        if not isinstance(inner, BaseDataset):
            return False
        for i in range(len(inner)):
            if inner.get_data_info(i).get('instances', True):
                return False
    return True


def _origin(dataset, key):
    path, inner = next(_innermost(dataset, key))
    return (
        f'Its annotations are read from {inner.ann_file or inner.data_root} ({path}.ann_file): '
        'correct the file or metainfo.classes.'
    )
