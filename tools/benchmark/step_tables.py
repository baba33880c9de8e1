"""The tables of train_step.py."""

from figures import goals_of
from grids import Grid, mebibytes, milliseconds, ratio


def workload_grid(workload: dict) -> Grid:
    """The table of one workload."""
    entries = {n: e for n, e in workload['entries'].items() if e['rounds']}
    has_peak = any(entry['peak'] is not None for entry in entries.values())
    columns = ['', 'trains, M', 'step', 'forward', 'backward', '+ optimizer', 'ms']
    columns += ['saved, MiB', 'GFLOP'] + (['peak, MiB'] if has_peak else [])
    millions = f'{workload["parameters"] / 1e6:.1f} M parameters'
    grid = Grid(f'{workload["name"]}: {workload["text"]}; {millions}', tuple(columns))
    for name, entry in entries.items():
        of = entry['ratios']
        cells = [
            name,
            f'{entry["trained"] / 1e6:.2f}',
            ratio(of['step'], with_spread=True),
            *(ratio(of[phase]) for phase in ('forward', 'backward', 'with_optimizer')),
            milliseconds(entry['seconds']['step']),
            mebibytes(entry['saved']),
            f'{sum(entry["operations"].values()) / 1e9:,.1f}',
        ]
        grid.rows.append((*cells, mebibytes(entry['peak'])) if has_peak else tuple(cells))
    grid.notes += [f'{n}: left out, {why}.' for n, why in workload['left_out'].items()]
    return grid


def goal_grid(data: dict) -> Grid:
    """The figures to reach that the run has something to say on."""
    grid = Grid('to reach', ('what', 'workload', 'rank', 'measured', 'at most', ''))
    for goal in goals_of(data['workloads']):
        rank = '' if goal['rank'] is None else str(goal['rank'])
        verdict = 'reached' if goal['reached'] else 'not reached'
        measured = f'{goal["measured"]:.3f}'
        grid.rows.append(
            (goal['text'], goal['workload'], rank, measured, f'{goal["most"]:.2f}', verdict)
        )
    return grid
