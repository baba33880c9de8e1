"""Methods on VTAB-1k: tuned on 800 and 200 images, trained on 1,000, tested at the end."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmengine.config import Config

from mmpeft.engine.config import compose, print_on_master
from mmpeft.engine.data_check import check_data
from mmpeft.engine.runs import check_seeds, combinations, run, with_values
from mmpeft.errors import TrainingError, UsageError, suggest

from .tasks import TASKS

TUNING, TESTING = ('train800', 'val200'), ('train800val200', 'test')
"""The lists that are trained and evaluated on."""


def for_task(
    cfg: Config, task: str, lists: tuple[str, str] = TESTING, root: str | Path | None = None
) -> Config:
    """The config of a classifier, for another task of VTAB-1k.

    Args:
        cfg: With a ``CustomDataset`` in each dataloader, such as
            ``mmpeft::frozen/convnext_vtab.py``; is not changed.
        task: Of :data:`~.tasks.TASKS`.
        lists: What is trained and what is evaluated on.
        root: The folder of all tasks; None for the one that ``cfg`` has its task in.

    Raises:
        UsageError: There is no such task.
    """
    if task not in TASKS:
        raise UsageError(f'VTAB-1k has no task {task!r}. {suggest(task, TASKS)}')
    cfg = compose(cfg)
    root = Path(cfg.train_dataloader.dataset.data_root).parent if root is None else Path(root)
    cfg.model.head.num_classes = TASKS[task]
    for loader, images in zip(
        ('train', 'val', 'test'), (lists[0], lists[1], lists[1]), strict=True
    ):
        place = dict(data_root=str(root / task), ann_file=f'{images}.txt')
        cfg[f'{loader}_dataloader'].dataset.update(place)
    return cfg


def benchmark(
    cfg: Config,
    work_dir: str | Path,
    tasks: Sequence[str] = tuple(TASKS),
    seeds: Sequence[int] = (0,),
    grid: Mapping[str, Sequence] | None = None,
    root: str | Path | None = None,
) -> list[dict]:
    """Train and test a config on each task with each seed; see :func:`~mmpeft.engine.runs.run`.

    Args:
        cfg: See :func:`for_task`.
        work_dir: Takes records, logs and checkpoints.
        tasks: Names of tasks.
        seeds: Of heads, adapters and batches.
        grid: Values to choose from, by the keys of :func:`~mmpeft.engine.runs.with_values`. For
            each task all combinations are trained on
            ``train800`` with the first seed, and the best on ``val200`` is taken. The first of
            equal ones wins, and one whose training fails loses.
        root: See :func:`for_task`.

    Returns:
        The records of the tests, by task and seed, each with its ``accuracy`` in percent.

    Raises:
        UsageError: A task or a key is unknown, a seed is invalid, the data is not there, or the
            config's evaluator gives no ``accuracy/top1``.
        TrainingError: A run went wrong, or all of a task's grid did.
    """
    check_seeds(seeds)
    choices = combinations(grid or {})
    for values in choices:
        with_values(cfg, values)  # raises for what is wrong, before a run begins
    purposes = [TESTING] if len(choices) == 1 else [TUNING, TESTING]
    for task, lists in itertools.product(tasks, purposes):
        check_data(for_task(cfg, task, lists, root), ('train', 'test'))
    records = []
    for task in tasks:
        best = choices[0]
        if TUNING in purposes:
            best = _tune(for_task(cfg, task, TUNING, root), work_dir, task, seeds[0], choices)
        chosen = with_values(for_task(cfg, task, TESTING, root), best)
        records += [_run(chosen, work_dir, task, 'test', seed) for seed in seeds]
    return records


def _tune(cfg, work_dir, task, seed, choices):
    """The options of the best training."""
    scores = []
    for options in choices:
        trial = _run(with_values(cfg, options), work_dir, task, 'val200', seed, may_fail=True)
        scores.append(-1 if trial['accuracy'] is None else trial['accuracy'])
    if max(scores) < 0:
        raise TrainingError(f'{task}: no values of the grid train. {trial["error"]}')
    best = choices[scores.index(max(scores))]
    print_on_master(f'{task}: {best} has {max(scores):.1f} % on val200.')
    return best


def _run(cfg, work_dir, task, split, seed, may_fail=False):
    """See :func:`~mmpeft.engine.runs.run`; its record with the ``accuracy``, None of a failure."""
    record = run(cfg, work_dir, f'{task}_{split}', dict(task=task, split=split), seed, may_fail)
    scores = record['scores'] or {}
    if scores and 'accuracy/top1' not in scores:
        raise UsageError(
            f'VTAB-1k compares accuracy/top1, and the evaluator of this config gives '
            f"{', '.join(scores)}. Write test_evaluator=dict(type='Accuracy', topk=(1,))."
        )
    return record | dict(accuracy=scores.get('accuracy/top1'))
