"""Tables from the records: scores with their intervals, and paired differences with a test."""

from collections.abc import Sequence
from typing import NamedTuple

from mmpeft.analysis.parameters import ppt
from mmpeft.analysis.seeds import Difference, Scores, differences, interval

from .plan import Records, finals, others
from .tasks import TASKS
from .trial import Trial


class Claim(NamedTuple):
    """An ordering that a paper reports.

    Attributes:
        better, worse: Methods of the study.
        source: Where it is reported.
        reported: Its figures.
    """

    better: str
    worse: str
    source: str
    reported: str


CLAIMS = (
    Claim(
        'flora',
        'lora',
        'FLoRA, Table 1',
        'ConvNeXt-V2-L at 13 M: COCO 48.1 to 47.4, ADE20K 51.9 to 51.4, DOTA 37.3 to 18.3',
    ),
    Claim(
        'flora',
        'dora',
        'FLoRA, Table 1',
        'ConvNeXt-V2-L at 13 M: COCO 48.1 to 47.2, ADE20K 51.9 to 50.9, DOTA 37.3 to 19.6',
    ),
    Claim(
        'liera',
        'lora',
        'LieRA, Tables 1 and 2',
        'ConvNeXt-V2-B: VTAB-1k 75.5 to 74.1, COCO box 39.1 to 35.5, both at rank 16',
    ),
    Claim(
        'liera_dora',
        'dora',
        'LieRA, Table 7',
        'ConvNeXt-V2-B at rank 16: VTAB-1k 75.5 to 74.7, COCO 42.5 to 38.4',
    ),
    Claim(
        'liera_pissa',
        'pissa',
        'LieRA, Table 7',
        'ConvNeXt-V2-B at rank 16: VTAB-1k 75.7 to 74.7, COCO 42.4 to 38.2',
    ),
    Claim(
        'liera_exact',
        'liera',
        'LieRA, Table 6',
        'nearly equal: VTAB-1k 75.7 to 75.5, COCO 42.7 to 42.3',
    ),
    Claim(
        'trilora_mpc_o',
        'trilora',
        'Subspace tuning, Table 2',
        'RoBERTa-base on GLUE at ranks 2 to 16: 85.67, 86.23, 86.60, 86.45 to 85.30, 85.89, '
        '85.99, 86.40',
    ),
    Claim('ssb', 'ssl', 'Subspace tuning, Table 2', 'RoBERTa-base on GLUE: 84.34 to 82.51'),
    Claim('ssb', 'ia3', 'Subspace tuning, Table 2', 'RoBERTa-base on GLUE: 84.34 to 83.91'),
    *(
        Claim('flora_factor', name, 'docs/methods.md', "not claimed: FLoRA(zero='factor0')")
        for name in ('flora', 'lora')
    ),
    Claim(
        'flora_kernels',
        'lora_kernels',
        'FLoRA, Table 1',
        'the first row again, here on kernels larger than 1x1 alone',
    ),
    *(
        Claim(f'{name}_auto', name, 'docs/scale.md', 'not claimed: a rule beside a tuned scale')
        for name in ('lora', 'flora', 'liera')
    ),
    *(
        Claim(f'{name}_sensitivity', name, 'docs/methods.md', 'not claimed: ranks by sensitivity')
        for name in ('lora', 'flora')
    ),
)


def scores(base: Trial, methods: list[str], seeds: int, records: Records) -> dict[str, Scores]:
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


class Elsewhere(NamedTuple):
    """Final runs of a method at a setting that tuning did not choose.

    Attributes:
        setting: The method, and in what the setting differs from the chosen one.
        scores: Test scores in percent by seed.
        gap: The difference from the chosen setting; None where fewer than two seeds have both.
    """

    setting: str
    scores: Scores
    gap: Difference | None


def also_run(base: Trial, methods: list[str], seeds: int, records: Records) -> list[Elsewhere]:
    """What was run at other settings than the chosen ones, p-values adjusted over all."""
    metric, chosen = TASKS[base.task].metric, scores(base, methods, seeds, records)
    found, pairs = {}, []
    for method in chosen:
        tuned = finals(base, method, seeds, records)[0]['trial']
        for trial, runs in others(base, method, seeds, records).items():
            keys = [key for key in ('epochs', 'rate', 'scale') if getattr(trial, key) != tuned[key]]
            changes = ', '.join(f'{key} {getattr(trial, key):g}' for key in keys)
            values = {r['trial']['seed']: 100 * r[metric] for r in runs if metric in r}
            if values:
                name = f'{method}, {changes}'
                found[name] = values
                pairs.append((name, method))
    gaps = {gap.better: gap for gap in differences(chosen | found, pairs)}
    return [Elsewhere(name, values, gaps.get(name)) for name, values in found.items()]


def compare(pairs: list[tuple[str, str]], by_seed: dict[str, Scores]) -> list[str]:
    """A table of paired differences, p-values adjusted over it; empty without a pair of seeds."""
    rows = [
        f'| {d.better} - {d.worse} | {d.mean:+.2f} ± {d.half:.2f} | {d.p_value} | {d.verdict} |'
        for d in differences(by_seed, pairs)
    ]
    head = ['', '| difference | points | corrected | verdict |', '| --- | ---: | ---: | --- |']
    return head + rows if rows else []


def score_table(base: Trial, methods: list[str], seeds: int, records: Records) -> list[str]:
    """A row a method: parameters, accuracy, seeds, PPT, and what was chosen."""
    lines = [
        f'| method | parameters | test {TASKS[base.task].metric} | seeds | PPT | rate | scale |',
        '| --- | ---: | ---: | ---: | ---: | ---: | ---: |',
    ]
    for method, values in scores(base, methods, seeds, records).items():
        run = finals(base, method, seeds, records)[0]
        mean, half = interval(list(values.values()))
        trial, count = run['trial'], run['parameters']
        setting = f'{trial["rate"]:g} | {trial["scale"]:g}' if trial['epochs'] else '- | -'
        lines.append(
            f'| {method} | {count:,} | {mean:.2f} ± {half:.2f} | {len(values)} '
            f'| {ppt(mean, count):.3f} | {setting} |'
        )
    return lines


def elsewhere_table(runs: Sequence[Elsewhere]) -> list[str]:
    """A row a setting that tuning did not choose; empty without any."""
    rows = []
    for run in runs:
        mean, half = interval(list(run.scores.values()))
        gap = f'{run.gap.mean:+.2f} ± {run.gap.half:.2f} ({run.gap.p_value})' if run.gap else ''
        rows.append(f'| {run.setting} | {mean:.2f} ± {half:.2f} | {len(run.scores)} | {gap} |')
    head = ['', '| also run | score | seeds | over the chosen setting |', '|---|---|---|---|']
    return head + rows if rows else []


def tables(base: Trial, methods: list[str], seeds: int, records: Records) -> str:
    """The report in Markdown."""
    by_seed = scores(base, methods, seeds, records)
    lines = [f'{base.task}, {base.backbone}, {base.size} px, budget {base.budget:,}', '']
    lines += score_table(base, methods, seeds, records)
    lines += compare([(c.better, c.worse) for c in CLAIMS], by_seed)
    lines += compare([(m, 'frozen') for m in by_seed if m != 'frozen'], by_seed)
    lines += elsewhere_table(also_run(base, methods, seeds, records))
    failed = sum(bool(record['failed']) for record in records.values())
    hours = sum(record['seconds'] for record in records.values()) / 3600
    lines += ['', f'{len(records)} trials, {failed} failed, {hours:.1f} core-hours.']
    budgets = {r['trial']['budget'] for r in records.values()} - {0, base.budget}
    if budgets:
        others = ' or '.join(map(str, sorted(budgets)))
        lines.append(f'Some of these have another budget, and --budget {others} shows them.')
    return '\n'.join(lines)
