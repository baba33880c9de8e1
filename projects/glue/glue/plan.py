"""Which trials a table takes, and which are left."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from mmpeft.checkpoint.journal import read_journal
from mmpeft.errors import UsageError

from .models import hook_of
from .trial import Trial, settings, sizes

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
    for trial in tuning:
        has_run(config, trial, records)
    last = max((trial.seed for trial in tuning), default=0)
    rates = sorted(trial.learning_rate for trial in tuning if trial.seed == last)
    means = {
        rate: np.mean([result(records[t.id]) for t in tuning if t.learning_rate == rate])
        for rate in rates
    }
    return Trial(task, method, seed, learning_rate=max(means, key=means.get, default=None))


def has_run(config: Mapping, trial: Trial, records: Records) -> bool:
    """Whether a trial has a record.

    Args:
        config: Of ``configs/``, with ``sha256`` of the ``model`` and, by task, the ``data``, where
            these are known.
        trial: What is run.
        records: By the trials' ids; those of earlier versions lack some keys.

    Raises:
        UsageError: It has one with other settings, of other data or of another model.
    """
    record = records.get(trial.id)
    if record is None:
        return False
    if 'model' not in record:
        return True
    for key, (has, says) in _compared(config, trial, record).items():
        if has != says:
            both = (has, says), (says, has)
            has, says = ({k: v for k, v in a.items() if v != b.get(k)} for a, b in both)
            what = ' and '.join(says) if key == 'sha256' else key
            raise UsageError(
                f'The record of {trial.id!r} differs in {what}: it has {has}, and this command '
                f'{says}. Name other files by --records.'
            )
    return True


def _compared(config, trial, record):
    """What a record has and what a config says, as far as both are known, by a name."""
    digests = config.get('sha256', {})
    available = record.get('available') or config.get('rows') or record['rows']['train']
    says = dict(
        training=settings(config, trial),
        hook=hook_of(config['methods'], trial.method),
        rows=sizes(config, trial, available),
        sha256={k: v.get(trial.task) if k == 'data' else v for k, v in digests.items()},
    )
    has = record | dict(rows={key: record['rows'].get(key) for key in says['rows']})
    if digests and 'sha256' not in record:  # a folder stands for the model downloaded into it
        has['sha256'], says['sha256'] = (
            dict(model=Path(name).name) for name in (record['model'], config['model'])
        )
    says = json.loads(json.dumps(says))
    return {key: (has[key], says[key]) for key in says if key in has and says[key]}


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
