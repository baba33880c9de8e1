"""Pictures of runs: bars of the step by phases, lines over ranks and sizes, time beside memory."""

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from growth import by_rank, by_size, single
from records import FLOOR, MEASURES, PHASES, by_workload, median

matplotlib.use('Agg')
COLOURS = dict(zip(PHASES, ('#4c78a8', '#9ecae9', '#d9d9d9'), strict=True))


def draw(runs, folder: Path) -> list[Path]:
    """Draw what was measured.

    Args:
        runs: As ``records.read`` returns them.
        folder: Gets train_step.png, train_step_ranks.png, train_step_sizes.png,
            evaluation.png, memory.png, memory_ranks.png and memory_sizes.png, those for which
            there are results.

    Returns:
        The files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    training, memory = by_workload(runs), by_workload(runs, 'memory')
    alone = single(memory)
    pictures = dict(
        train_step=(bars, single(training).values()),
        train_step_ranks=(lines, by_rank(training)),
        train_step_sizes=(lines, by_size(training)),
        evaluation=(bars, by_workload(runs, 'evaluate').values()),
        memory=(points, [(alone, measure) for measure in MEASURES if alone]),
        memory_ranks=(lines, _beside(by_rank, memory)),
        memory_sizes=(lines, _beside(by_size, memory)),
    )
    written = []
    for name, (paint, contents) in pictures.items():
        if contents:
            written.append(folder / f'{name}.png')
            _draw(paint, list(contents), written[-1])
    return written


def _beside(grow, workloads):
    """Curves of the step, each with those of memory behind it."""
    pairs = zip(*(grow(workloads, measure) for measure in MEASURES), strict=True)
    return [curves for pair in pairs for curves in pair]


def _draw(paint, contents, path):
    columns = min(len(contents), 2)
    rows = -(-len(contents) // columns)
    height = 1.2 + 0.24 * max(map(len, contents)) if paint is bars else 3.6
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


def points(ax, content):
    """A row for each variant, with a point for each workload, of one measure."""
    workloads, measure = content
    every = (result.variant for results in workloads.values() for result in results.values())
    names = [name for name in dict.fromkeys(every) if name != FLOOR]
    for results, marker in zip(workloads.values(), 'osD^vP*X', strict=False):
        floor = results[FLOOR]
        found = [result for result in results.values() if result.rounds and result is not floor]
        ratios = [result.over(floor, measure) for result in found]
        rows = [names.index(result.variant) for result in found]
        ax.plot(ratios, rows, marker, alpha=0.8, label=floor.text)
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.invert_yaxis()
    ax.grid(axis='y', linewidth=0.4)
    ax.axvline(1, color='black', linewidth=0.8)
    ax.set_xlim(left=0)
    ax.set_xlabel(f"{MEASURES[measure]}, times the frozen network's in torch", fontsize=8)
    if measure == 'saved':
        ax.figure.legend(
            *ax.get_legend_handles_labels(),
            loc='outside upper center',
            ncols=4,
            fontsize=8,
            frameon=False,
        )


def lines(ax, curves):
    """A line for each variant over ranks or sizes."""
    for name, points in curves.lines.items():
        ax.plot(*zip(*sorted(points.items()), strict=True), marker='o', markersize=3, label=name)
    ax.axhline(1, color='black', linewidth=0.8)
    values = curves.points()
    ax.set_xscale('log', base=2)
    ax.set_xticks(values, [f'{x:g}' for x in values])
    ax.minorticks_off()
    ax.set_title(curves.title, fontsize=9)
    ax.set_xlabel(curves.label, fontsize=8)
    ax.set_ylabel(f'{MEASURES[curves.measure]}, times the floor', fontsize=8)
    ax.legend(fontsize=7, frameon=False)
