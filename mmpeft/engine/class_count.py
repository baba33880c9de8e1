"""Whether the heads of a model have as many classes as the data that trains them.

mmdet's NumClassCheckHook asks this of detectors, in an assertion, and of all that has
``num_classes``. Here a head with too many classes has a warning: it trains, and a label more is
not wrong in a segmentor or classifier.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from mmengine.runner import Runner
from torch import nn

from mmpeft.errors import UsageError, listed

SHOWN = 8  # names of a long list
OTHER_LABELS = r'backbone|rpn_head|semantic_head'
"""Modules by whose names others than the dataset's classes are learned, or none."""


def check_class_count(
    runner: Runner, model: nn.Module, dataset: Any, classes: Sequence[str]
) -> None:
    """Compare the heads of a model with the classes of its training dataset.

    Not compared are heads for other labels (proposals, maps of semantic labels beside a detector,
    edges), models that read the names of classes, and datasets whose labels are of another number
    (panoptic ones, HRSC without its kinds of ships).

    Args:
        runner: Whose log has the warning.
        model: Without what wraps it.
        dataset: Of training.
        classes: Of the dataset.

    Raises:
        UsageError: A head has fewer classes.
    """
    labels_differ = 'thing_classes' in dataset.metainfo if classes else True
    if labels_differ or getattr(dataset, 'classwise', None) is False:
        return
    numbers = dict(_numbers(model))
    has = f'train_dataloader.dataset has {len(classes)} classes ({listed(list(classes), SHOWN)})'
    if few := [path for path, number in numbers.items() if number < len(classes)]:
        raise UsageError(
            f'{has}, and {_written(few, numbers)}: labels of the others would be lost, or fail. '
            f'Set {_keys(few)}={len(classes)} there, or metainfo=dict(classes=...) of the datasets '
            'to the classes that you mean.'
        )
    if many := [path for path, number in numbers.items() if number > len(classes)]:
        runner.logger.warning(
            f'{has}, and {_written(many, numbers)}. The classes beyond have no labels, and '
            "COCO's evaluation fails where one of them is predicted. Set "
            f'{_keys(many)}={len(classes)} there.'
        )


def _written(paths, numbers):
    return ' and '.join(f'{path}.num_classes={numbers[path]}' for path in paths[:4])


def _keys(paths):
    panoptic = any('panoptic' in path for path in paths)
    return 'num_things_classes + num_stuff_classes' if panoptic else 'num_classes'


def _numbers(model: nn.Module) -> Iterator[tuple[str, int]]:
    """The classes of the heads that learn those of the dataset, by their keys in the config."""
    if hasattr(model, 'language_model') or hasattr(model, 'text_encoder'):
        return
    for path, module in model.named_modules():
        number = getattr(module, 'num_classes', None)
        named_head = re.search(r'head(\.\d+)?$', path) and not re.search(OTHER_LABELS, path)
        if isinstance(number, int) and named_head and not _has_other_labels(module):
            yield f'model.{path}', number


def _has_other_labels(head):
    """Objects of any class, one mask for all classes, mmseg's one map for two, or STDC's edges."""
    if 'RPN' in type(head).__name__ or hasattr(head, 'boundary_threshold'):
        return True
    return getattr(head, 'class_agnostic', False) or getattr(head, 'out_channels', None) == 1
