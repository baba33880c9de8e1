"""Which trials a table takes, and which are left."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from mmpeft.errors import UsageError

from .trial import Trial

Records = dict[str, dict]


def read_records(paths: Sequence[Path]) -> Records:
    """The records of some files, one JSON line a trial, by the trials' ids."""
    lines = [line for p in paths if p.is_file() for line in p.read_text().splitlines()]
    return {record['id']: record for record in map(json.loads, lines)}


def append_record(path: Path, record: Mapping) -> None:
    """Add one line to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('a') as file:
        file.write(json.dumps(record) + '\n')


def result(record: Mapping) -> float:
    """What the tables print of a record: the first metric of the first split."""
    first = next(iter(record['scores'].values()))
    return next(iter(first.values()))


def tuning_trials(config: Mapping, task: str, method: str) -> list[Trial]:
    """A trial for each of the method's ``rates`` and each of ``tuning['seeds']``, or none."""
    rates = config['methods'].get(method, {}).get('rates', ())
    if rates and 'tuning' not in config:
        raise UsageError(f"{method!r} has rates to be chosen from, and the config has no 'tuning'.")
    seeds = range(config['tuning'].get('seeds', 1)) if rates else ()
    return [Trial(task, method, seed, 'tune', rate) for rate in rates for seed in seeds]


def final_trial(config: Mapping, task: str, method: str, seed: int, records: Records) -> Trial:
    """A trial that is scored, at the rate of the highest mean in tuning (the lower of equals)."""
    tuning = tuning_trials(config, task, method)
    by_rate = {
        rate: np.mean([result(records[t.id]) for t in tuning if t.learning_rate == rate])
        for rate in sorted({t.learning_rate for t in tuning})
    }
    return Trial(task, method, seed, learning_rate=max(by_rate, key=by_rate.get, default=None))


def pending(
    config: Mapping, tasks: Sequence[str], methods: Sequence[str], seeds: int, records: Records
) -> Iterator[Trial]:
    """Trials without a record, as they follow each other: ``records`` grows in between.

    All methods are tuned first. Then come the seeds one after another, each with all methods, so
    that a run that is stopped has treated all alike.
    """
    for task in tasks:
        for method in methods:
            yield from (t for t in tuning_trials(config, task, method) if t.id not in records)
    for seed in range(seeds):
        for task in tasks:
            for method in methods:
                trial = final_trial(config, task, method, seed, records)
                if trial.id not in records:
                    yield trial
