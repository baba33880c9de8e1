"""Which trials are to be run, from the records that there are.

Every method gets the same effort. Twelve candidates train for a few epochs on 800 images, the
best four train longer on two draws of 1,000 images, and the one of the highest mean accuracy on
the 200 that are held out (of the lowest mean loss, where accuracies are equal) is trained on
1,000 images with each seed. The test set is read once a final run.
"""

from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import product

import numpy as np

import mmpeft
from mmpeft.methods.delta import DeltaMethod
from mmpeft.methods.ranked import Ranked

from .methods import METHODS
from .trial import Trial

CANDIDATES = 12
SHORT, LONG, FINAL = 4, 8, 12  # epochs
KEPT = 4
DRAWS = (100, 101)  # seeds of the draws that tune; those of the final runs count from 0

Records = dict[str, dict]


def size_of(method: str) -> tuple[bool, bool]:
    """Whether a method has a budget, and a scale to be tuned."""
    arguments = METHODS[method]['method']
    kind = mmpeft.METHODS.get(arguments['type'])
    tuned = issubclass(kind, DeltaMethod) and arguments.get('scale') != 'auto'
    return issubclass(kind, Ranked), tuned


def candidates(method: str) -> list[dict]:
    """Twelve settings: four scales by three rates, or twelve rates or ridges."""
    if method == 'frozen':
        return [dict(ridge=float(f'{x:.2g}')) for x in np.geomspace(1e-5, 1, CANDIDATES)]
    if size_of(method)[1]:
        pairs = product((0.25, 1.0, 4.0, 16.0), (1e-3, 3e-3, 1e-2))
        return [dict(scale=scale, rate=rate) for scale, rate in pairs]
    return [dict(rate=float(f'{x:.2g}')) for x in np.geomspace(3e-5, 1e-1, CANDIDATES)]


def best(trials: list[Trial], records: Records, count: int) -> list[Trial]:
    """The settings of the highest mean accuracy over their draws; of equals, the lowest loss."""

    def order(setting):
        found = [records[t.id] for t in trials if replace(t, seed=0) == setting]
        mean = lambda key: float(np.mean([record[key] for record in found]))  # noqa: E731
        return any(r['failed'] for r in found), -round(mean('accuracy'), 6), mean('held_loss')

    return sorted(dict.fromkeys(replace(t, seed=0) for t in trials), key=order)[:count]


def stages(base: Trial, seeds: int, records: Records) -> Iterator[list[Trial]]:
    """The stages of one method; the next one is asked for when all trials of one have records."""
    short, long = (0, 0) if base.method == 'frozen' else (SHORT, LONG)
    first = [replace(base, epochs=short, **c) for c in candidates(base.method)]
    yield [replace(t, seed=DRAWS[0]) for t in first]
    kept = best([replace(t, seed=DRAWS[0]) for t in first], records, KEPT)
    second = [replace(t, epochs=long, seed=draw) for t in kept for draw in DRAWS]
    yield second
    (chosen,) = best(second, records, 1)
    final = FINAL if base.method != 'frozen' else 0
    yield [replace(chosen, stage='final', epochs=final, seed=seed) for seed in range(seeds)]


def frozen_of(base: Trial, records: Records) -> Trial | None:
    """The frozen backbone's chosen trial, whose ridge the heads of all methods converge with."""
    frozen = replace(base, method='frozen', budget=0)
    steps = stages(frozen, 1, records)
    for _ in range(2):
        if any(t.id not in records for t in next(steps)):
            return None
    return next(steps)[0]


def pending(base: Trial, methods: list[str], seeds: int, records: Records) -> Iterator[Trial]:
    """Trials without a record whose stage can start, in order of importance."""
    frozen = frozen_of(base, records)
    for method in methods:
        if method == 'frozen':
            start = replace(base, method=method, budget=0)
        elif frozen is None:
            return
        else:
            budget = base.budget if size_of(method)[0] else 0
            start = replace(base, method=method, budget=budget, ridge=frozen.ridge)
        for stage in stages(start, seeds, records):
            missing = [t for t in stage if t.id not in records]
            yield from missing
            if missing:
                break


def finals(base: Trial, method: str, seeds: int, records: Records) -> list[dict]:
    """The records of a method's final runs, by seed, as far as there are any."""
    start = replace(base, method=method)
    found = []
    for record in records.values():
        t = record['trial']
        keys = ('task', 'backbone', 'size', 'method')
        if t['stage'] == 'final' and all(t[k] == asdict(start)[k] for k in keys):
            if not t['budget'] or t['budget'] == base.budget:
                found.append(record)
    return sorted(found, key=lambda r: r['trial']['seed'])[:seeds]
