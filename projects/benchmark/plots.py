"""Pictures of runs: bars of the step by phases, and lines over ranks and sizes."""

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from growth import by_rank, by_size, single
from records import FLOOR, PHASES, by_workload, median

matplotlib.use('Agg')
COLOURS = dict(zip(PHASES, ('#4c78a8', '#9ecae9', '#d9d9d9'), strict=True))


def draw(runs, folder: Path) -> list[Path]:
    """Draw what was measured.

    Args:
        runs: As ``records.read`` returns them.
        folder: Gets train_step.png, train_step_ranks.png, train_step_sizes.png
            and evaluation.png, those for which there are results.

    Returns:
        The files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    training = by_workload(runs)
    pictures = dict(
        train_step=(bars, single(training).values()),
        train_step_ranks=(lines, by_rank(training)),
        train_step_sizes=(lines, by_size(training)),
        evaluation=(bars, by_workload(runs, 'evaluate').values()),
    )
    written = []
    for name, (paint, contents) in pictures.items():
        if contents:
            written.append(folder / f'{name}.png')
            _draw(paint, list(contents), written[-1])
    return written


def _draw(paint, contents, path):
    columns = min(len(contents), 2)
    rows = -(-len(contents) // columns)
    height = 3.6 if paint is lines else 1.2 + 0.24 * max(map(len, contents))
    figure, axes = plt.subplots(
        rows, columns, figsize=(6.4 * columns, height * rows), squeeze=False, layout='constrained'
    )
    for ax in axes.flat[len(contents) :]:
        ax.set_axis_off()
    for ax, content in zip(axes.flat, contents, strict=False):
        paint(ax, content)
        ax.spines[['top', 'right']].set_visible(False)
    if paint is bars and 'backward' in contents[0][FLOOR].rounds:
        axes[0, 0].legend(fontsize=8, frameon=False, loc='upper right')
    figure.savefig(path, dpi=150)
    plt.close(figure)


def bars(ax, results):
    """A bar for each variant of a workload, divided by phases."""
    floor = results[FLOOR]
    measured = [result for result in results.values() if result.rounds]
    for row, result in enumerate(measured):
        left, ratio = 0.0, median(result.ratios(floor))
        step = median(result.seconds())
        for phase in result.rounds:
            seconds = median(result.seconds([phase]))
            if phase == 'optimizer':
                seconds = max(median(result.seconds(PHASES)) - step, 0.0)
            width = seconds * ratio / step
            ax.barh(row, width, left=left, color=COLOURS[phase], label=None if row else phase)
            left += width
        ax.text(left, row, f' {ratio:.2f}', va='center', size=8)
    ax.set_yticks(range(len(measured)), [result.name for result in measured], fontsize=8)
    ax.invert_yaxis()
    ax.axvline(1, color='black', linewidth=0.8)
    ax.set_title(f'{floor.text}\n1 = {median(floor.seconds()) * 1e3:,.0f} ms', fontsize=9)
    note = ' (figures: without the optimizer)' if 'optimizer' in floor.rounds else ''
    ax.set_xlabel(f'times the floor{note}', fontsize=8)
    ax.margins(x=0.12, y=0.02)


def lines(ax, curves):
    """A line for each variant over ranks or sizes."""
    for name, points in curves.lines.items():
        ax.plot(*zip(*sorted(points.items()), strict=True), marker='o', markersize=3, label=name)
    ax.axhline(1, color='black', linewidth=0.8)
    points = curves.points()
    ax.set_xscale('log', base=2)
    ax.set_xticks(points, [f'{x:g}' for x in points])
    ax.minorticks_off()
    ax.set_title(curves.title, fontsize=9)
    ax.set_xlabel(curves.label, fontsize=8)
    ax.set_ylabel('step, times the floor', fontsize=8)
    ax.legend(fontsize=7, frameon=False)
