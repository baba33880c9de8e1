"""Which trials a table takes, and which are left."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from mmpeft.checkpoint.journal import read_journal
from mmpeft.errors import UsageError

from .trial import Trial, settings

Records = dict[str, dict]


def read_records(paths: Sequence[Path]) -> Records:
    """The records of some files, one JSON line a trial, by the trials' ids."""
    return {record['id']: record for path in paths for record in read_journal(path)}


def result(record: Mapping) -> float:
    """What the tables print of a record: the first metric of the first split."""
    first = next(iter(record['scores'].values()))
    return next(iter(first.values()))


def tuning_trials(config: Mapping, task: str, method: str, records: Records) -> Iterator[Trial]:
    """What chooses among the method's ``rates``, or nothing if it has none.

    All of them run with the first of ``tuning['seeds']``, and the ``tuning['kept']`` best of them
    with the others. Each trial has its record before the next one is asked for.
    """
    rates = config['methods'].get(method, {}).get('rates', ())
    if rates and 'tuning' not in config:
        raise UsageError(f"{method!r} has rates to be chosen from, and the config has no 'tuning'.")
    first = [Trial(task, method, 0, 'tune', rate) for rate in sorted(rates)]
    yield from first
    if first:
        ranked = sorted(first, key=lambda trial: -result(records[trial.id]))
        for seed in range(1, config['tuning']['seeds']):
            yield from (replace(trial, seed=seed) for trial in ranked[: config['tuning']['kept']])


def final_trial(config: Mapping, task: str, method: str, seed: int, records: Records) -> Trial:
    """A trial that is scored, at the rate of the highest mean in tuning (the lower of equals).

    Raises:
        KeyError: The method is not tuned yet.
    """
    tuning = [*tuning_trials(config, task, method, records)]
    last = max((trial.seed for trial in tuning), default=0)
    rates = sorted(trial.learning_rate for trial in tuning if trial.seed == last)
    means = {
        rate: np.mean([result(records[t.id]) for t in tuning if t.learning_rate == rate])
        for rate in rates
    }
    return Trial(task, method, seed, learning_rate=max(means, key=means.get, default=None))


def has_run(config: Mapping, trial: Trial, records: Records) -> bool:
    """Whether a trial has a record.

    Raises:
        UsageError: It has one of another model, or with other settings of the training.
    """
    record = records.get(trial.id)
    if record is None:
        return False
    if 'model' not in record:
        return True
    ours = json.loads(json.dumps(settings(config, trial)))
    # A folder stands for the model that was downloaded into it.
    models = [Path(name).name for name in (record['model'], config['model'])]
    pairs = dict(model=models, training=[record['training'], ours])
    for key, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise UsageError(
                f'The records have {trial.id!r} with another {key}: {theirs}, where the config '
                f'says {ours}. Name other files by --records.'
            )
    return True


def pending(
    config: Mapping, tasks: Sequence[str], methods: Sequence[str], seeds: int, records: Records
) -> Iterator[Trial]:
    """Trials without a record, as they follow each other: ``records`` grows in between.

    All methods are tuned first. Then come the seeds one after another, each with all methods, so
    that a run that is stopped has treated all alike.
    """
    for task in tasks:
        for method in methods:
            tuning = tuning_trials(config, task, method, records)
            yield from (trial for trial in tuning if not has_run(config, trial, records))
    for seed in range(seeds):
        for task in tasks:
            for method in methods:
                trial = final_trial(config, task, method, seed, records)
                if not has_run(config, trial, records):
                    yield trial
