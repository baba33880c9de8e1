"""Which trials are to be run, from the records that there are.

One rule holds for every method. Twelve candidates train for a few epochs on a part of the
training images, the best four train longer on two draws, and the one of the highest mean score on
the images that are held out (of the lowest mean loss, where scores are equal) is trained on all
training images with each seed. Where it lies at an edge of what was tried, what lies past the edge
is tried first. The test set is read once a final run.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import numpy as np

import mmpeft
from mmpeft.methods.delta import DeltaMethod
from mmpeft.methods.ranked import Ranked

from .methods import METHODS
from .tasks import TASKS, spread
from .trial import Trial

KEPT = 4
DRAWS = (100, 101)  # seeds of the draws that tune; those of the final runs count from 0
STEPS = dict(scale=4.0, rate=10**0.5, ridge=10**0.5, head_rate=10**0.5)  # past an edge
WIDENED = 4  # times, at most

Records = dict[str, dict]


def size_of(method: str) -> tuple[bool, bool]:
    """Whether a method has a budget, and a scale to be tuned."""
    arguments = METHODS[method]['method']
    kind = mmpeft.METHODS.get(arguments['type'])
    tuned = issubclass(kind, DeltaMethod) and arguments.get('scale') != 'auto'
    return issubclass(kind, Ranked), tuned


def candidates(base: Trial) -> list[dict]:
    """Twelve settings: four scales by three rates, or twelve rates, or of the heads."""
    if base.method == 'frozen':
        return TASKS[base.task].heads
    if size_of(base.method)[1]:
        pairs = product((0.25, 1.0, 4.0, 16.0), TASKS[base.task].rates)
        return [dict(scale=scale, rate=rate) for scale, rate in pairs]
    return spread('rate', 3e-5, 1e-1)


def best(trials: list[Trial], records: Records, count: int) -> list[Trial]:
    """The settings of the highest mean score over their draws; of equals, the lowest loss."""
    task = TASKS[trials[0].task]

    def order(setting):
        found = [records[t.id] for t in trials if replace(t, seed=0) == setting]
        if any(record['failed'] for record in found):
            return True, 0.0, 0.0
        score, loss = (float(np.mean([r[key] for r in found])) for key in (task.metric, task.loss))
        return False, -round(score, 6), loss

    return sorted(dict.fromkeys(replace(t, seed=0) for t in trials), key=order)[:count]


def beyond(chosen: Trial, tried: list[Trial]) -> list[Trial]:
    """What lies past the edges at which a setting lies: a scale with all rates, another rate."""
    found = []
    for key, step in STEPS.items():
        value, values = getattr(chosen, key), {getattr(t, key) for t in tried}
        if len(values) == 1 or min(values) < value < max(values):
            continue
        new = float(f'{value * step if value == max(values) else value / step:.2g}')
        row = [t for t in tried if t.scale == chosen.scale] if key == 'scale' else [chosen]
        found += [replace(t, **{key: new}) for t in row]
    return found


def stages(base: Trial, seeds: int, records: Records) -> Iterator[list[Trial]]:
    """The stages of one method; the next one is asked for when all trials of one have records."""
    task = TASKS[base.task]
    trains = base.method != 'frozen' or task.trains_frozen
    short, long, final = (n * trains for n in (task.short, task.long, task.final))
    first = [replace(base, epochs=short, **c) for c in candidates(base)]
    yield [replace(t, seed=DRAWS[0]) for t in first]
    kept = best([replace(t, seed=DRAWS[0]) for t in first], records, KEPT)
    tried, second = [replace(t, epochs=long) for t in first], []
    new = [replace(t, epochs=long) for t in kept]
    for _ in range(1 + WIDENED):
        second += [replace(t, seed=draw) for t in new for draw in DRAWS]
        yield second
        (chosen,) = best(second, records, 1)
        new = beyond(chosen, tried)
        tried += new
        if not new:
            break
    yield [replace(chosen, stage='final', epochs=final, seed=seed) for seed in range(seeds)]


def chosen_runs(base: Trial, seeds: int, records: Records) -> list[Trial]:
    """The final runs of a method, none while its setting is not chosen."""
    for stage in stages(base, seeds, records):
        if stage[0].stage == 'final':
            return stage
        if any(t.id not in records for t in stage):
            return []


def start(base: Trial, method: str, records: Records) -> Trial | None:
    """A method with the heads that the frozen backbone chose; None while it has not."""
    frozen = replace(base, method='frozen', budget=0)
    if method == 'frozen':
        return frozen
    if not (runs := chosen_runs(frozen, 1, records)):
        return None
    budget = base.budget if size_of(method)[0] else 0
    heads = dict(ridge=runs[0].ridge, head_rate=runs[0].head_rate)
    return replace(base, method=method, budget=budget, **heads)


def pending(base: Trial, methods: list[str], seeds: int, records: Records) -> Iterator[Trial]:
    """Trials without a record whose stage can start, in order of importance."""
    for method in methods:
        if not (first := start(base, method, records)):
            return
        for stage in stages(first, seeds, records):
            missing = [t for t in stage if t.id not in records]
            yield from missing
            if missing:
                break


def tuned(base: Trial, method: str, seeds: int, records: Records) -> list[Trial]:
    """A method's final runs, by seed; none while its setting is not chosen."""
    first = start(base, method, records)
    return chosen_runs(first, seeds, records) if first else []


def elsewhere(
    base: Trial, methods: list[str], seeds: int, records: Records, at: dict
) -> Iterator[Trial]:
    """Final runs without a record of tuned methods, but with some arguments of the trial ``at``."""
    for method in methods:
        for trial in tuned(base, method, seeds, records):
            if (moved := replace(trial, **at)).id not in records:
                yield moved


def finals(base: Trial, method: str, seeds: int, records: Records) -> list[dict]:
    """The records of a method's final runs, by seed, as far as there are any."""
    return [records[t.id] for t in tuned(base, method, seeds, records) if t.id in records]


def others(base: Trial, method: str, seeds: int, records: Records) -> dict[Trial, list[dict]]:
    """Records of final runs at settings that tuning did not choose, by setting (of seed 0)."""
    runs, found = finals(base, method, seeds, records), {}
    for record in records.values() if runs else ():
        trial = Trial(**record['trial'])
        free = {key: getattr(trial, key) for key in ('rate', 'scale', 'epochs', 'seed')}
        if trial == replace(Trial(**runs[0]['trial']), **free) and record not in runs:
            found.setdefault(replace(trial, seed=0), []).append(record)
    return found
