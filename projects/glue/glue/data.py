"""Data sets of sentences: GLUE, or files of one's own."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import datasets
from datasets import Dataset, Value

from mmpeft.errors import UsageError, suggest

from .tasks import Task, correlation, find_task, pearson, spearman

GLUE = 'nyu-mll/glue'


@dataclass(frozen=True)
class Texts:
    """A data set that is ready for a tokenizer.

    Attributes:
        task: Whose columns its splits have.
        splits: ``train`` and those that the task scores.
        classes: Names of the classes; None for a regression.
    """

    task: Task
    splits: dict[str, Dataset]
    classes: tuple[str, ...] | None

    @cached_property
    def sha256(self) -> str:
        """The digest of all rows and classes."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for name, split in self.splits.items():
            for rows in split.iter(10_000):
                digest.update(json.dumps([name, rows]).encode())
        return digest.hexdigest()[:16]


def read_texts(
    task: str | None,
    data: str = GLUE,
    sentences: Sequence[str] = ('sentence',),
    label: str = 'label',
) -> Texts:
    """Read a task of GLUE, or a data set of one's own.

    Args:
        task: Its name, or None for a data set of one's own.
        data: Name on the Hugging Face hub, or a folder with a file (csv, tsv, json, jsonl, parquet)
            or a folder of files for each split, named by it (``train.csv``, ``validation.csv``);
            for a task of GLUE a folder of such folders, named as the tasks, serves too.
        sentences: Of a data set of one's own, its columns of one text or of a pair.
        label: Likewise, its column of labels.

    Raises:
        UsageError: There is no such data set, or it lacks a split, a column or a label.
    """
    found = find_task(task) if task else Task(tuple(sentences), label=label)
    splits = _load(data, task, ('train', *found.splits))
    if not task:
        scored = [name for name in ('validation', 'test') if name in splits][:1]
        found = replace(found, splits=tuple(scored) or ('validation',))
    needed = dict.fromkeys((*found.sentences, found.label))
    for name in ('train', *found.splits):
        if name not in splits:
            raise UsageError(
                f'{data!r} has no split {name!r}; it has {", ".join(map(repr, splits))}. Name a '
                "file of the folder by each split, such as 'train.csv' and 'validation.csv'."
            )
        for column in needed:
            if column not in splits[name].column_names:
                raise UsageError(
                    f'{data!r} has no column {column!r} in {name!r}. '
                    f'{suggest(column, splits[name].column_names)} Name the columns of a data set '
                    'of your own with --sentences and --label.'
                )
    splits = {name: splits[name].select_columns([*needed]) for name in ('train', *found.splits)}
    return _with_labels(found, splits, data)


def _load(data, task, names):
    path = Path(data)
    folder = path / task if task and (path / task).is_dir() else path
    if path.is_file():
        raise UsageError(f'{data!r} is a file. Name a folder with one for each split.')
    try:
        if folder.is_dir():  # the splits of one's own are found by their names
            files = {name: f'{name}[-.]*' for name in names} if task else None
            return datasets.load_dataset(str(folder), data_files=files)
        return datasets.load_dataset(data, *(task,) * (data == GLUE))
    except Exception as error:  # its type depends on the network, and on the file
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        download = (
            f'Where there is a network, "hf download {data} --repo-type dataset --local-dir '
            f'data/{path.name}" downloads one; then name the folder with --data. '
        )
        raise UsageError(
            f'The data set {str(folder)!r} cannot be read: {reason.rstrip(".")}. '
            f'{"" if folder.is_dir() else download}A folder of your own has a csv, tsv, json, '
            "jsonl or parquet file for each split, such as 'train.csv' and 'validation.csv'."
        ) from error


def _with_labels(task, splits, data):
    """Labels as class indices from 0, or as floating point numbers."""
    label, train = task.label, splits['train']
    for name, split in splits.items():
        if not len(split) or None in split.unique(label):
            raise UsageError(
                f'{data!r} has no rows, or rows without a {label!r}, in {name!r}. Leave out rows '
                'without a label.'
            )
    feature = train.features[label]
    if isinstance(feature, datasets.ClassLabel):
        return Texts(task, splits, tuple(feature.names))
    if feature.dtype.startswith('float'):
        kept = {name: split.cast_column(label, Value('float32')) for name, split in splits.items()}
        scored = (
            task
            if pearson in task.metrics
            else replace(task, metrics=(correlation, pearson, spearman))
        )
        return Texts(scored, kept, None)
    classes = sorted(train.unique(label))
    index = {name: number for number, name in enumerate(classes)}
    for name, split in splits.items():
        for value in split.unique(label):
            if value not in index:
                raise UsageError(
                    f'{data!r} has the {label!r} {value!r} in {name!r}, which no row of '
                    "'train' has."
                )
    kept = {
        name: split.map(lambda row: {label: index[row[label]]}, features=None)
        for name, split in splits.items()
    }
    return Texts(task, kept, tuple(map(str, classes)))
