"""Scores over the values of a sweep, as a picture and a table: FLoRA's Fig. 3 and 5."""

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from mmpeft.errors import UsageError, suggest

SCORES = ('coco/bbox_mAP', 'mIoU', 'dota/mAP', 'accuracy/top1')
"""What is drawn of a task unless another score is named, the first that there is."""


@dataclass(frozen=True)
class Point:
    """One setting.

    Attributes:
        values: By key.
        parameters: What trains in the backbone; None where all runs failed.
        scores: Of the seeds whose training did not fail.
        failed: How many did.
    """

    values: dict
    parameters: int | None
    scores: tuple[float, ...]
    failed: int

    @property
    def mean(self) -> float:
        """Over seeds; NaN of none."""
        return statistics.fmean(self.scores) if self.scores else float('nan')

    @property
    def deviation(self) -> float | None:
        """The standard deviation over seeds; None of fewer than two."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None


def score_name(records: Sequence[Mapping], name: str | None = None) -> str:
    """The score that a sweep is judged by.

    Args:
        records: Of :func:`mmpeft.engine.runs.sweep`.
        name: The one that is asked for, if any.

    Raises:
        UsageError: All runs failed, or there is no such score.
    """
    known = next((record['scores'] for record in records if record['scores']), {})
    known = [key for key, value in known.items() if isinstance(value, int | float)]
    if not known:
        raise UsageError('No run of the sweep has ended with a score.')
    if name is not None and name not in known:
        raise UsageError(f'The runs have no score {name!r}. {suggest(name, known)}')
    return name or next((key for key in SCORES if key in known), known[0])


def points(records: Sequence[Mapping], score: str) -> list[Point]:
    """The settings of a sweep, the seeds of each together, in their order."""
    groups = defaultdict(list)
    for record in records:
        groups[json.dumps(record['values'])].append(record)  # values may be lists
    found = []
    for runs in groups.values():
        ended = [run for run in runs if run['scores'] is not None]
        parameters = ended[0]['backbone_parameters'] if ended else None
        scores = tuple(run['scores'][score] for run in ended)
        found.append(Point(runs[0]['values'], parameters, scores, len(runs) - len(ended)))
    return found


def table(found: Sequence[Point], score: str, title: str = '') -> Table:
    """One line a setting: mean and standard deviation over seeds."""
    shown = Table(*found[0].values, title=title)
    for heading in ('parameters', score, 'std', 'seeds', 'failed'):
        shown.add_column(heading, justify='right')
    for point in found:
        size = '-' if point.parameters is None else f'{point.parameters:,}'
        spread = '-' if point.deviation is None else f'{point.deviation:.4f}'
        counts = str(len(point.scores)), str(point.failed)
        shown.add_row(*map(str, point.values.values()), size, f'{point.mean:.4f}', spread, *counts)
    return shown


def draw_curves(found: Sequence[Point], score: str, title: str = '') -> Figure:
    """The score over the first key: a line for each combination of the others.

    A line is the mean over seeds, in a band of one standard deviation, with a dot for each seed.

    Args:
        found: Of :func:`points`.
        score: Its name.
        title: Of the picture.
    """
    axis = next(iter(found[0].values))
    numeric = all(isinstance(point.values[axis], int | float) for point in found)
    if numeric:
        found = sorted(found, key=lambda point: point.values[axis])
    places = [point.values[axis] if numeric else str(point.values[axis]) for point in found]
    lines = defaultdict(list)
    for place, point in zip(places, found, strict=True):
        rest = [f'{key}={value}' for key, value in point.values.items() if key != axis]
        lines[', '.join(rest)].append((place, point))
    figure = Figure((6.4, 4.2), dpi=120, layout='constrained')
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    for label, line in lines.items():
        x, line = zip(*line, strict=True)
        mean = [point.mean for point in line]
        (drawn,) = ax.plot(x, mean, marker='o', label=label or None)
        spread = [point.deviation or 0.0 for point in line]
        low, high = ([m + sign * s for m, s in zip(mean, spread, strict=True)] for sign in (-1, 1))
        ax.fill_between(x, low, high, color=drawn.get_color(), alpha=0.15, linewidth=0)
        for place, point in zip(x, line, strict=True):
            ax.scatter([place] * len(point.scores), point.scores, s=8, color=drawn.get_color())
    if numeric:
        if min(places) > 0:
            ax.set_xscale('log')
        ax.set_xticks(sorted(set(places)), [f'{value:g}' for value in sorted(set(places))])
    ax.minorticks_off()
    ax.set(xlabel=axis, ylabel=score, title=title)
    ax.spines[['top', 'right']].set_visible(False)
    if any(lines):
        ax.legend(fontsize=8, frameon=False)
    return figure
