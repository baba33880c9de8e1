"""Pictures of a run: bars of the step by phases, and lines over the ranks."""

from pathlib import Path

from figures import FLOOR

PHASES = dict(forward='#4c78a8', backward='#9ecae9', optimizer='#d9d9d9')


def draw(data: dict, path: Path) -> list[Path]:
    """Draw what a run has measured.

    Args:
        data: Of the run, summarized.
        path: Of the bars; the lines, if there are several ranks, stand
            beside it as ``<name>_ranks.png``.

    Returns:
        The files written; none without matplotlib.
    """
    measured = {n: w for n, w in data['workloads'].items() if _is_measured(w)}
    try:
        import matplotlib
    except ModuleNotFoundError:
        return []
    if not measured:
        return []
    matplotlib.use('Agg')
    written = [_bars(measured, path)]
    ranked = {n: w for n, w in measured.items() if len(w['ranks']) > 1}
    if ranked:
        written.append(_lines(ranked, path.with_name(f'{path.stem}_ranks{path.suffix}')))
    return written


def _is_measured(workload):
    return bool(workload['entries'].get(FLOOR, {}).get('rounds'))


def _figure(count, height):
    import matplotlib.pyplot as plt

    columns = min(count, 2)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(6.4 * columns, height * rows), squeeze=False, layout='constrained'
    )
    for unused in axes.flat[count:]:
        unused.set_axis_off()
    return figure, axes.flat


def _save(figure, path):
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _bars(workloads, path):
    most = max(len(workload['entries']) for workload in workloads.values())
    figure, axes = _figure(len(workloads), 1.2 + 0.24 * most)
    for ax, workload in zip(axes, workloads.values(), strict=False):
        entries = {n: e for n, e in workload['entries'].items() if e['rounds']}
        floor = entries[FLOOR]['seconds']['step']['median']
        for row, entry in enumerate(entries.values()):
            left = 0.0
            scale = entry['ratios']['step']['median'] / entry['seconds']['step']['median']
            for phase, colour in PHASES.items():
                width = _phase_seconds(entry, phase) * scale
                ax.barh(row, width, left=left, color=colour, label=None if row else phase)
                left += width
            ax.text(left, row, f' {entry["ratios"]["step"]["median"]:.2f}', va='center', size=8)
        ax.set_yticks(range(len(entries)), entries, fontsize=8)
        ax.invert_yaxis()
        ax.axvline(1, color='black', linewidth=0.8)
        ax.set_title(f'{workload["text"]}\n1 = {floor * 1e3:,.0f} ms', fontsize=9)
        ax.set_xlabel('times the floor (figures: without the optimizer)', fontsize=8)
        ax.margins(x=0.12, y=0.02)
        ax.spines[['top', 'right']].set_visible(False)
    axes[0].legend(fontsize=8, frameon=False, loc='upper right')
    return _save(figure, path)


def _phase_seconds(entry, phase):
    seconds = entry['seconds']
    if phase == 'optimizer':
        return max(seconds['with_optimizer']['median'] - seconds['step']['median'], 0.0)
    return seconds[phase]['median']


def _lines(workloads, path):
    figure, axes = _figure(len(workloads), 3.6)
    for ax, workload in zip(axes, workloads.values(), strict=False):
        lines = {}
        for entry in workload['entries'].values():
            if entry['rank'] is not None and entry['rounds']:
                point = entry['rank'], entry['ratios']['step']['median']
                lines.setdefault(entry['variant'], []).append(point)
        ranks = sorted({rank for points in lines.values() for rank, _ in points})
        for name, points in lines.items():
            ax.plot(*zip(*sorted(points), strict=True), marker='o', markersize=3, label=name)
        ax.axhline(1, color='black', linewidth=0.8)
        ax.set_xscale('log', base=2)
        ax.set_xticks(ranks, map(str, ranks))
        ax.set_title(workload['text'], fontsize=9)
        ax.set_xlabel('rank', fontsize=8)
        ax.set_ylabel('step, times the floor', fontsize=8)
        ax.legend(fontsize=7, frameon=False)
        ax.spines[['top', 'right']].set_visible(False)
    return _save(figure, path)
