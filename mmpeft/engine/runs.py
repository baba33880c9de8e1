"""Trainings of a config in several settings: each is run once, and is a line of a journal."""

import copy
import gc
import hashlib
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from mmengine.config import Config

from mmpeft.checkpoint.journal import append_record, read_journal
from mmpeft.errors import TrainingError, UsageError
from mmpeft.registry import METHODS

from .config import compose, find_hook
from .launch import build_runner

JOURNAL = 'runs.jsonl'


def combinations(grid: Mapping[str, Sequence]) -> list[dict]:
    """All combinations of the values of a grid, by its keys; the last key varies fastest."""
    return [dict(zip(grid, chosen, strict=True)) for chosen in itertools.product(*grid.values())]


def check_key(cfg: Config, key: str) -> None:
    """Raise UsageError for a dotted key below nothing, which would change nothing."""
    node, *parents = [cfg, *key.split('.')[:-1]]
    for part in parents:
        index = int(part) if isinstance(node, list) and part.isdigit() else part
        try:
            node = node[index]
        except (KeyError, IndexError, TypeError) as error:
            raise UsageError(
                f'{key}: the config has no {part!r} there. Write such as '
                'optim_wrapper.optimizer.lr=3e-4,1e-3.'
            ) from error


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise UsageError for a seed that numpy does not take."""
    for seed in seeds:
        if not 0 <= seed < 2**32:
            raise UsageError(f'--seeds: {seed} is not a seed. Write numbers from 0 to 2**32 - 1.')


def with_values(cfg: Config, values: Mapping) -> Config:
    """A copy of a config with other values.

    Args:
        cfg: Composed.
        values: By dotted keys, or by the names of arguments of its method: ``rank``, ``scale``.

    Raises:
        UsageError: The config has no such key, no or several methods, or the method has no such
            argument.
    """
    dotted = {key: value for key, value in values.items() if '.' in key}
    for key in dotted:
        check_key(cfg, key)
    cfg, own = compose(cfg, options=dotted), values.keys() - dotted.keys()
    if not own:
        return cfg
    hook = find_hook(cfg)
    if hook is None or not isinstance(hook.method, Mapping):
        raise UsageError(
            f'{", ".join(own)}: {cfg.filename} has {"no method" if hook is None else "several"}, '
            'whose arguments these are. Name one by --method, or write a dotted key.'
        )
    spent = dict(budget=None) if 'rank' in own and 'budget' in hook.method else {}
    hook.method.update(spent | {key: values[key] for key in values if key in own})
    METHODS.build(copy.deepcopy(hook.method))  # raises for what is wrong
    return cfg


def run(
    cfg: Config,
    work_dir: str | Path,
    name: str,
    labels: Mapping,
    seed: int,
    may_fail: bool = False,
) -> dict:
    """Train a config and evaluate what the last iteration leaves, unless it was done before.

    A finished run is a line of ``<work_dir>/runs.jsonl``, and is not run again unless its config
    changes. An interrupted one goes on from its last checkpoint.

    Args:
        cfg: Of a whole run; ``test_dataloader`` is what is evaluated on.
        work_dir: Takes records, logs and checkpoints. Calls with other names can share it and run
            side by side.
        name: Begins the name of the run's folder.
        labels: For the record.
        seed: Of the run.
        may_fail: Make a record of a training that fails, with ``scores`` None and its ``error``.

    Returns:
        The labels, ``seed``, ``scores`` by name, what trains in the backbone and beside it
        (``backbone_parameters``, ``other_parameters``), ``memory`` (the peak of a CUDA device in
        bytes, or None), ``seconds``, ``work_dir`` and ``key``, a hash of the config.
    """
    cfg = compose(cfg, options=dict(randomness=dict(seed=seed)))
    cfg.update(val_dataloader=None, val_cfg=None, val_evaluator=None)  # the end is tested, once
    text = json.dumps(cfg.to_dict(), sort_keys=True, default=str)
    key = hashlib.sha256(text.encode()).hexdigest()[:12]
    journal = Path(work_dir, JOURNAL)
    for record in read_journal(journal):
        if record['key'] == key:
            return record | labels
    cfg.work_dir = str(Path(work_dir, f'{name}_seed{seed}_{key}'))
    cfg.experiment_name = Path(cfg.work_dir).name
    if cfg.get('visualizer'):
        cfg.visualizer.name = cfg.experiment_name  # mmengine keeps one by its name, with its folder
    if Path(cfg.work_dir, 'last_checkpoint').exists():
        cfg.update(resume=True, load_from=None)
    record = dict(**labels, seed=seed, key=key, work_dir=cfg.work_dir)
    began = time.perf_counter()
    try:
        record |= _measured(cfg)
    except TrainingError as error:
        if not may_fail:
            raise
        record |= dict(scores=None, error=str(error))
    record['seconds'] = time.perf_counter() - began
    append_record(journal, record)
    return record


def sweep(
    cfg: Config, work_dir: str | Path, over: Mapping[str, Sequence], seeds: Sequence[int] = (0,)
) -> list[dict]:
    """Train a config with all combinations of some values, each with every seed; see :func:`run`.

    Args:
        cfg: Composed.
        work_dir: Takes records, logs and checkpoints.
        over: Values by the keys of :func:`with_values`.
        seeds: Of heads, adapters and batches.

    Returns:
        The records, each with its ``values``; ``scores`` is None where training failed.

    Raises:
        UsageError: See :func:`with_values` and :func:`check_seeds`; no run is begun.
    """
    check_seeds(seeds)
    for key, chosen in [*over.items(), ('--seeds', seeds)]:
        if len({json.dumps(value, default=str) for value in chosen}) < len(chosen):
            raise UsageError(f'{key}: a value is given twice, in {", ".join(map(str, chosen))}.')
    settings = [(values, with_values(cfg, values)) for values in combinations(over)]
    Path(work_dir).mkdir(parents=True, exist_ok=True)
    records = []
    for values, chosen in settings:
        name = '_'.join(f'{key.rpartition(".")[2]}{value}' for key, value in values.items())
        for seed in seeds:
            record = run(chosen, work_dir, name, dict(values=values), seed, may_fail=True)
            records.append(record)
    return records


def _measured(cfg):
    """Scores, parameters that train, and memory of a run."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        gc.collect()  # the run before, whose memory would count
        torch.cuda.reset_peak_memory_stats()
    runner = build_runner(cfg)
    runner.train()
    memory = torch.cuda.max_memory_allocated() if on_gpu else None
    target = getattr(runner.model, 'backbone', runner.model)
    backbone = {p for p in target.parameters() if p.requires_grad}
    trained = {p for p in runner.model.parameters() if p.requires_grad}
    return dict(
        backbone_parameters=sum(p.numel() for p in backbone),
        other_parameters=sum(p.numel() for p in trained - backbone),
        memory=memory,
        scores=runner.test(),
    )
