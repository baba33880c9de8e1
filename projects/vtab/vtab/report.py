"""The table of runs over the tasks of VTAB-1k."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from mmpeft.analysis.parameters import ppt

from .tasks import GROUPS


@dataclass(frozen=True)
class Row:
    """A task, or a mean over tasks.

    Attributes:
        name: Of the task or mean.
        accuracy: In percent, the mean over seeds.
        spread: Its standard deviation over seeds; None of a single seed.
        ppt: See :func:`~mmpeft.analysis.parameters.ppt`.
        memory: The peak of an accelerator in bytes, the largest of all runs; None on a CPU.
    """

    name: str
    accuracy: float
    spread: float | None
    ppt: float
    memory: int | None


def rows(records: Sequence[Mapping]) -> list[Row]:
    """The tasks of a benchmark, their groups, and the means over groups and over tasks.

    Papers that print one number, LieRA among them, print the mean of the groups.

    Args:
        records: One of each task and seed, with ``task``, ``seed``, ``accuracy`` in percent,
            ``backbone_parameters`` and ``memory``.
    """
    found = {(record['task'], record['seed']): record for record in records}
    done = {task for task, _ in found}
    groups = {g: [t for t in tasks if t in done] for g, tasks in GROUPS.items()}
    groups = {g: tasks for g, tasks in groups.items() if tasks}
    tasks = [task for members in groups.values() for task in members]
    means = {g: dict.fromkeys(members, 1 / len(members)) for g, members in groups.items()}
    weights = {task: {task: 1.0} for task in tasks}
    weights |= {f'{g} ({len(mean)})': mean for g, mean in means.items()}
    weights[f'mean of {len(groups)} groups'] = {
        task: weight / len(groups) for mean in means.values() for task, weight in mean.items()
    }
    weights[f'mean of {len(tasks)} tasks'] = dict.fromkeys(tasks, 1 / len(tasks))
    seeds = sorted({seed for _, seed in found})
    return [_row(name, mean, found, seeds) for name, mean in weights.items()]


def _row(name, weights, found, seeds):
    """Of a weighted mean over tasks."""

    def mean(key, seed):
        return sum(weight * found[task, seed][key] for task, weight in weights.items())

    scores = [mean('accuracy', seed) for seed in seeds]
    accuracy = statistics.mean(scores)
    peaks = [found[task, seed]['memory'] for task in weights for seed in seeds]
    return Row(
        name,
        accuracy,
        statistics.stdev(scores) if len(scores) > 1 else None,
        ppt(accuracy, mean('backbone_parameters', seeds[0])),
        None if None in peaks else max(peaks),
    )


def table(records: Sequence[Mapping], title: str = '') -> Table:
    """The rows of :func:`rows` to be printed."""
    seeds = len({record['seed'] for record in records})
    sizes = sorted({record['backbone_parameters'] for record in records})
    size = ' to '.join(f'{size / 1e6:.2f}' for size in dict.fromkeys((sizes[0], sizes[-1])))
    caption = f'{size} M parameters train in the backbone; mean over seeds: {seeds}'
    shown = Table(title=title, caption=caption)
    for number, heading in enumerate(('', 'top-1 %', 'std', 'PPT', 'memory')):
        shown.add_column(heading, justify='right' if number else 'left')
    for number, row in enumerate(rows(records)):
        if number == len({record['task'] for record in records}):
            shown.add_section()
        spread = '-' if row.spread is None else f'{row.spread:.2f}'
        memory = '-' if row.memory is None else f'{row.memory / 2**30:.2f} GiB'
        shown.add_row(row.name, f'{row.accuracy:.2f}', spread, f'{row.ppt:.3f}', memory)
    return shown
