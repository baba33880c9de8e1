"""Tables from the records: scores with their intervals, and paired differences with a test."""

import numpy as np
from scipy import stats

from mmpeft.analysis.vtab import ppt

from .plan import Records, finals
from .tasks import TASKS
from .trial import Trial

# The orderings of the papers: (better, worse, where it is claimed).
CLAIMS = (
    ('flora', 'lora', 'FLoRA, Tables 1 and 2'),
    ('liera', 'lora', 'LieRA, Tables 1 and 2'),
    ('liera_dora', 'dora', 'LieRA, Table 5'),
    ('liera_pissa', 'pissa', 'LieRA, Table 5'),
    ('liera_exact', 'liera', 'LieRA: nearly equal'),
    ('trilora_mpc_o', 'trilora', 'Subspace tuning, MPC'),
    ('ssb', 'ssl', 'Subspace tuning'),
    ('ssb', 'ia3', 'Subspace tuning'),
)


def interval(values: np.ndarray) -> tuple[float, float]:
    """Mean and half the width of its 95% interval by Student's t."""
    if len(values) < 2:
        return float(np.mean(values)), float('nan')
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return float(np.mean(values)), float(half)


def holm(p_values: list[float]) -> list[float]:
    """P-values adjusted for their number (Holm, 1979)."""
    order = np.argsort(p_values)
    raised = [(len(order) - i) * p_values[k] for i, k in enumerate(order)]
    adjusted = np.minimum(np.maximum.accumulate(raised), 1.0)
    return [float(adjusted[np.where(order == k)[0][0]]) for k in range(len(order))]


def scores(base: Trial, methods: list[str], seeds: int, records: Records) -> dict[str, dict]:
    """Test scores in percent by seed, of each method that has final runs with a score."""
    metric = TASKS[base.task].metric
    found = {
        method: {
            run['trial']['seed']: 100 * run[metric]
            for run in finals(base, method, seeds, records)
            if metric in run
        }
        for method in methods
    }
    return {method: by_seed for method, by_seed in found.items() if by_seed}


def paired(a: dict, b: dict) -> np.ndarray:
    """Differences a - b of the seeds that both have."""
    return np.array([a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())])


def compare(pairs: list[tuple[str, str, str]], by_seed: dict[str, dict]) -> list[str]:
    """Rows of a table of paired differences, p-values adjusted over the table."""
    pairs = [p for p in pairs if len(paired(by_seed.get(p[0], {}), by_seed.get(p[1], {}))) > 1]
    gaps = [paired(by_seed[a], by_seed[b]) for a, b, _ in pairs]
    p_values = holm([float(stats.ttest_1samp(gap, 0).pvalue) for gap in gaps])
    rows = []
    for (a, b, where), gap, p in zip(pairs, gaps, p_values, strict=True):
        mean, half = interval(gap)
        verdict = 'no difference shown' if p > 0.05 else ('higher' if mean > 0 else 'lower')
        rows.append(f'| {a} - {b} | {mean:+.2f} ± {half:.2f} | {p:.3f} | {verdict} | {where} |')
    return rows


def tables(base: Trial, methods: list[str], seeds: int, records: Records) -> str:
    """The report in Markdown."""
    by_seed = scores(base, methods, seeds, records)
    lines = [
        f'{base.task}, {base.backbone}, {base.size} px, budget {base.budget:,}',
        '',
        f'| method | parameters | test {TASKS[base.task].metric} | seeds | PPT | rate | scale |',
        '| --- | ---: | ---: | ---: | ---: | ---: | ---: |',
    ]
    for method, values in by_seed.items():
        run = finals(base, method, seeds, records)[0]
        mean, half = interval(np.array(list(values.values())))
        trial, count = run['trial'], run['parameters']
        setting = f'{trial["rate"]:g} | {trial["scale"]:g}' if trial['epochs'] else '- | -'
        lines.append(
            f'| {method} | {count:,} | {mean:.2f} ± {half:.2f} | {len(values)} '
            f'| {ppt(mean, count):.3f} | {setting} |'
        )
    head = [
        '',
        '| difference | points | p (Holm) | verdict | source |',
        '| --- | ---: | ---: | --- | --- |',
    ]
    over_frozen = [(m, 'frozen', '') for m in by_seed if m != 'frozen']
    for pairs in list(CLAIMS), over_frozen:
        rows = compare(pairs, by_seed)
        lines += head + rows if rows else []
    failed = sum(bool(record['failed']) for record in records.values())
    hours = sum(record['seconds'] for record in records.values()) / 3600
    lines += ['', f'{len(records)} trials, {failed} failed, {hours:.1f} core-hours.']
    return '\n'.join(lines)
