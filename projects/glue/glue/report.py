"""Tables of records in the papers' layout, and paired differences."""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from .plan import Records, final_trial, has_run, result

NAMES = dict(
    mnli='MNLI',
    sst2='SST-2',
    cola='CoLA',
    qqp='QQP',
    qnli='QNLI',
    rte='RTE',
    mrpc='MRPC',
    stsb='STS-B',
)


def finals(
    config: Mapping, task: str, method: str, seeds: int, records: Records
) -> dict[int, dict]:
    """The records of a method's final runs by seed, as far as there are any.

    Raises:
        UsageError: They are of other settings than the config's.
    """
    found = {}
    for seed in range(seeds):
        try:
            trial = final_trial(config, task, method, seed, records)
        except KeyError:  # it is not tuned yet
            break
        if has_run(config, trial, records):
            found[seed] = records[trial.id]
    return found


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation of fractions, in percent; '-' of none."""
    if not len(values):
        return '-'
    deviation = f' ± {100 * np.std(values, ddof=1):.2f}' if len(values) > 1 else ''
    return f'{100 * np.mean(values):.2f}{deviation}'


def table(
    config: Mapping, tasks: Sequence[str], methods: Sequence[str], seeds: int, records: Records
) -> str:
    """A row a method and a column a task in Markdown: mean and standard deviation over seeds.

    The last column has those of each seed's mean over the tasks, where all of them have run.
    """
    titles = [NAMES.get(task, task) for task in tasks] + ['Avg.'] * (len(tasks) > 1)
    lines = [
        f'| Method | Parameters | Seeds | {" | ".join(titles)} |',
        f'| --- | ---: | ---: |{" ---: |" * len(titles)}',
    ]
    for method in methods:
        runs = {task: finals(config, task, method, seeds, records) for task in tasks}
        if not any(runs.values()):
            continue
        shared = set.intersection(*(set(found) for found in runs.values()))
        cells = [spread([result(r) for r in found.values()]) for found in runs.values()]
        if len(tasks) > 1:
            means = [np.mean([result(runs[task][s]) for task in tasks]) for s in sorted(shared)]
            cells.append(spread(means))
        parameters = next(r['parameters'] for found in runs.values() for r in found.values())
        counts = sorted({len(found) for found in runs.values()})
        cells = [f'{parameters:,}', ' to '.join(map(str, {counts[0]: 0, counts[-1]: 0})), *cells]
        lines.append(f'| {method} | {" | ".join(cells)} |')
    return '\n'.join(lines)


def differences(
    config: Mapping,
    tasks: Sequence[str],
    methods: Sequence[str],
    seeds: int,
    records: Records,
    against: str,
) -> str:
    """Differences to a method, paired by task and seed, with 95% intervals by Student's t."""
    lines = [
        '',
        f'| Task | Method - {against} | Points | 95% interval | p |',
        '| --- | --- | ---: | ---: | ---: |',
    ]
    for task in tasks:
        base = finals(config, task, against, seeds, records)
        for method in methods:
            runs = finals(config, task, method, seeds, records)
            both = sorted(runs.keys() & base.keys())
            if method == against or len(both) < 2:
                continue
            a, b = ([100 * result(found[s]) for s in both] for found in (runs, base))
            test = stats.ttest_rel(a, b)
            low, high = test.confidence_interval()
            p = '-' if np.isnan(test.pvalue) else f'{test.pvalue:.3f}'  # all differences are 0
            lines.append(
                f'| {NAMES.get(task, task)} | {method} | {np.subtract(a, b).mean():+.2f} '
                f'| {low:+.2f} to {high:+.2f} | {p} |'
            )
    return '\n'.join(lines)
