"""What a sweep ends with: a table, files and a plot."""

import csv
import json
import statistics
import sys

from demo_report import SCORES
from rich.console import Console
from rich.table import Table

import mmpeft
from mmpeft.engine.config import read_config
from mmpeft.engine.injections import adapt, build_model
from mmpeft.errors import UsageError
from mmpeft.methods import Ranked
from mmpeft.methods.base import FAMILIES


def score(run):
    """The task's first score."""
    return next(iter(scores_of(run).values()))


def scores_of(run):
    """Scores by the names of ``SCORES``, in their order."""
    found = run.result['scores']
    return {label: found[name] for name, label in SCORES.items() if name in found}


def summary_of(runs):
    """A method's runs in one row.

    Args:
        runs (list[Run]): With the seeds that count.

    Returns:
        dict: ``mean`` and ``std`` are of the task's first score over seeds,
            ``scores`` has both for all.
    """
    cfg = read_config(runs[0].config)
    method = mmpeft.METHODS.get(cfg.default_hooks.peft.method.type)
    row = dict(
        method=runs[0].method,
        family=method.card.family,
        lr=runs[0].lr,
        budgeted=issubclass(method, Ranked),
        failures=sorted({run.result['failure'] for run in runs if not run.is_done}),
        runs=sum(run.is_done for run in runs),
    )
    try:
        counted = adapt(build_model(cfg, meta=True), cfg)
    except UsageError as error:
        row['failures'] = [str(error)]
    else:
        trained = counted.unfrozen if method.trains_base else counted.adapters
        row |= dict(
            parameters=trained,
            share=trained / counted.base,
            arguments=counted.rows[0].method if counted.rows else f'{method.__name__}()',
        )
    done = [run for run in runs if run.is_done]
    if done:
        row['scores'] = {
            label: (
                statistics.mean(scores_of(run)[label] for run in done),
                statistics.stdev(scores_of(run)[label] for run in done) if len(done) > 1 else None,
            )
            for label in scores_of(done[0])
        }
        row['mean'], row['std'] = next(iter(row['scores'].values()))
        row['seconds_per_step'] = statistics.median(r.result['seconds_per_step'] for r in done)
        row['seconds'] = statistics.median(r.result['seconds'] for r in done)
    return row


def cells(rows):
    """Column names and rows of the printed table, as texts."""
    labels = next((list(row['scores']) for row in rows if row['runs']), [])
    names = ['method', 'family', 'parameters', 'share', 'lr', *labels, 'runs', 's/step', 's']
    lines = []
    for row in rows:
        size = (
            [f'{row["parameters"]:,}', f'{row["share"]:.2%}'] if 'parameters' in row else ['', '']
        )
        line = [row['method'], row['family'], *size, f'{row["lr"]:g}']
        if row['runs']:
            line += [
                f'{mean:.3f}' + ('' if std is None else f' ± {std:.3f}')
                for mean, std in row['scores'].values()
            ]
            times = [f'{row["seconds_per_step"]:.2f}', f'{row["seconds"]:.0f}']
        else:
            line += ['failed' for _ in labels]
            times = ['', '']
        lines.append([*line, str(row['runs']), *times])
    return names, lines


def show(rows, setting):
    """Print the table, and each failure."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    names, lines = cells(rows)
    table = Table(
        title=f'{setting.task}: {setting.steps} steps from one detector, budget {setting.budget}',
        caption='mean ± standard deviation over seeds; s/step and s (whole run) are medians',
    )
    for name in names:
        text = name in ('method', 'family')
        table.add_column(name, justify='left' if text else 'right', no_wrap=True)
    for line in lines:
        table.add_row(*line)
    console.print(table)
    for row in rows:
        for failure in row['failures']:
            console.print(f'{row["method"]} failed: {failure}', style='red', highlight=False)


def write(rows, runs, folder):
    """results.json with every run, .csv and .md with the table, .png with a plot."""
    content = dict(setting=vars(runs[0].setting), methods=rows, runs=[run.result for run in runs])
    (folder / 'results.json').write_text(json.dumps(content, indent=2))
    columns = list(dict.fromkeys(key for row in rows for key in row if key != 'scores'))
    with (folder / 'results.csv').open('w', newline='') as file:
        writer = csv.DictWriter(file, columns, extrasaction='ignore', lineterminator='\n')
        writer.writeheader()
        writer.writerows(row | dict(failures='; '.join(row['failures'])) for row in rows)
    names, lines = cells(rows)
    rules = ['---' if name in ('method', 'family') else '---:' for name in names]
    text = '\n'.join(f'| {" | ".join(line)} |' for line in [names, rules, *lines])
    (folder / 'results.md').write_text(text + '\n')
    plot(rows, folder / 'results.png')
    for file in sorted(folder.glob('results.*')):
        print(f'written: {file}')


def plot(rows, path):
    """The first score of each method, and against its parameters, with the spread over seeds."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    rows = [row for row in reversed(rows) if row['runs'] and 'parameters' in row]
    if not rows:
        return
    size = (12, 2 + 0.2 * len(rows))
    figure, (ranking, cost) = pyplot.subplots(1, 2, figsize=size, layout='constrained')
    for number, family in enumerate(FAMILIES):
        members = [(place, row) for place, row in enumerate(rows) if row['family'] == family]
        style = dict(fmt='o', capsize=2, markersize=4, color=f'C{number}', label=family)
        means = [row['mean'] for _, row in members]
        spread = [row['std'] or 0 for _, row in members]
        if members:
            ranking.errorbar(means, [place for place, _ in members], xerr=spread, **style)
            cost.errorbar([row['parameters'] for _, row in members], means, yerr=spread, **style)
    score_name = next(iter(rows[0]['scores']))
    ranking.set_yticks(range(len(rows)), [f'{r["method"]} ({r["parameters"]:,})' for r in rows])
    ranking.set(xlabel=score_name)
    ranking.legend(loc='lower right')
    cost.set_xscale('symlog', linthresh=100)
    cost.set(xlabel='parameters that train in the backbone', ylabel=score_name)
    for axes in (ranking, cost):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
