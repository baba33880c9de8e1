"""Methods on VTAB-1k: tuned on 800 and 200 images, trained on 1,000, tested at the end."""

import gc
import hashlib
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from mmengine.config import Config

from mmpeft.analysis.vtab import TASKS
from mmpeft.errors import MissingFileError, TrainingError, UsageError, near

from .config import compose, say
from .data_check import describe, missing_data
from .launch import build_runner

TUNING, TESTING = ('train800', 'val200'), ('train800val200', 'test')
"""The lists that are trained and evaluated on."""


def for_task(
    cfg: Config, task: str, lists: tuple[str, str] = TESTING, root: str | Path | None = None
) -> Config:
    """The config of a classifier, for another task of VTAB-1k.

    Args:
        cfg: With a ``CustomDataset`` in each dataloader, such as
            ``mmpeft::frozen/convnext_vtab.py``; is not changed.
        task: Of :data:`~mmpeft.analysis.vtab.TASKS`.
        lists: What is trained and what is evaluated on.
        root: The folder of all tasks; None for the one that ``cfg`` has its task in.

    Raises:
        UsageError: There is no such task.
    """
    if task not in TASKS:
        raise UsageError(f'VTAB-1k has no task {task!r}. {near(task, TASKS)}')
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
    """Train and test a config on each task with each seed.

    Every finished run is one line of ``<work_dir>/runs.jsonl``, and is not run again unless its
    config changes. An interrupted one goes on from its last checkpoint. Calls with other tasks can
    share a folder and run side by side.

    Args:
        cfg: See :func:`for_task`.
        work_dir: Takes records, logs and checkpoints.
        tasks: Names of tasks.
        seeds: Of heads, adapters and batches.
        grid: Values to choose from, by dotted keys. For each task all combinations are trained on
            ``train800`` with the first seed, and the best on ``val200`` is taken. The first of
            equal ones wins, and one whose training fails loses.
        root: See :func:`for_task`.

    Returns:
        The records of the tests, by task and seed.

    Raises:
        UsageError: A task or a key is unknown, or the data is not there.
        TrainingError: A run went wrong, or all of a task's grid did.
    """
    for key in grid or {}:
        _check_key(cfg, key)
    keys, values = list(grid or {}), itertools.product(*(grid or {}).values())
    combinations = [dict(zip(keys, chosen, strict=True)) for chosen in values]
    purposes = [TESTING] if len(combinations) == 1 else [TUNING, TESTING]
    for task, lists in itertools.product(tasks, purposes):
        missing = missing_data(for_task(cfg, task, lists, root), ('train', 'test'))
        if missing:
            raise MissingFileError(f'{task}: {describe(missing)}')
    records = []
    for task in tasks:
        best = combinations[0]
        if TUNING in purposes:
            best = _tune(for_task(cfg, task, TUNING, root), work_dir, task, seeds[0], combinations)
        chosen = compose(for_task(cfg, task, TESTING, root), options=best)
        records += [run(chosen, work_dir, task, 'test', seed) for seed in seeds]
    return records


def _check_key(cfg, key):
    """Refuse a key below nothing, which would change nothing."""
    node, *parents = [cfg, *key.split('.')[:-1]]
    for part in parents:
        index = int(part) if isinstance(node, list) and part.isdigit() else part
        try:
            node = node[index]
        except (KeyError, IndexError, TypeError) as error:
            raise UsageError(
                f'--grid {key}: the config has no {part!r} there. Write such as '
                'optim_wrapper.optimizer.lr=3e-4,1e-3.'
            ) from error


def _tune(cfg, work_dir, task, seed, combinations):
    """The options of the best training."""
    scores = []
    for options in combinations:
        trial = run(compose(cfg, options=options), work_dir, task, 'val200', seed, may_fail=True)
        scores.append(-1 if trial['accuracy'] is None else trial['accuracy'])
    if max(scores) < 0:
        raise TrainingError(f'{task}: no values of the grid train. {trial["error"]}')
    best = combinations[scores.index(max(scores))]
    say(f'{task}: {best} has {max(scores):.1f} % on val200.')
    return best


def run(
    cfg: Config, work_dir: str | Path, task: str, split: str, seed: int, may_fail: bool = False
) -> dict:
    """Train a config and evaluate what the last epoch leaves; see :func:`benchmark`.

    Args:
        cfg: Of :func:`for_task`.
        work_dir: With the records.
        task: For the record.
        split: Likewise: what ``test_dataloader`` reads.
        seed: Of the run.
        may_fail: Make a record of a training that fails, with ``accuracy`` None and its ``error``.

    Returns:
        ``task``, ``split``, ``seed``, ``accuracy`` in percent, what trains in the backbone and
        beside it (``backbone_parameters``, ``other_parameters``), ``memory`` (the peak of a CUDA
        device in bytes, or None), ``seconds``, ``work_dir`` and ``key``, a hash of the config.
    """
    cfg = compose(cfg, options=dict(randomness=dict(seed=seed)))
    cfg.update(val_dataloader=None, val_cfg=None, val_evaluator=None)  # the end is tested, once
    text = json.dumps(cfg.to_dict(), sort_keys=True, default=str)
    key = hashlib.sha256(text.encode()).hexdigest()[:12]
    journal = Path(work_dir, 'runs.jsonl')
    lines = journal.read_text().splitlines() if journal.exists() else []
    for record in map(json.loads, lines):
        if record['key'] == key:
            return record
    cfg.work_dir = str(Path(work_dir, f'{task}_{split}_seed{seed}_{key}'))
    cfg.experiment_name = Path(cfg.work_dir).name
    if Path(cfg.work_dir, 'last_checkpoint').exists():
        cfg.update(resume=True, load_from=None)
    record = dict(task=task, split=split, seed=seed, key=key, work_dir=cfg.work_dir)
    began = time.perf_counter()
    try:
        record |= _measured(cfg)
    except TrainingError as error:
        if not may_fail:
            raise
        record |= dict(accuracy=None, error=str(error))
    record['seconds'] = time.perf_counter() - began
    with journal.open('a') as file:
        file.write(json.dumps(record) + '\n')
    return record


def _measured(cfg):
    """Accuracy, parameters that train, and memory of a run."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        gc.collect()  # the run before, whose memory would count
        torch.cuda.reset_peak_memory_stats()
    runner = build_runner(cfg)
    runner.train()
    memory = torch.cuda.max_memory_allocated() if on_gpu else None
    backbone = {p for p in runner.model.backbone.parameters() if p.requires_grad}
    trained = {p for p in runner.model.parameters() if p.requires_grad}
    return dict(
        backbone_parameters=sum(p.numel() for p in backbone),
        other_parameters=sum(p.numel() for p in trained - backbone),
        memory=memory,
        accuracy=runner.test()['accuracy/top1'],
    )
