"""Write the tables of docs/which_method.md from the records of the projects.

    python docs/which_method_page.py [--check]

Scores are those of projects/transfer_study and projects/glue, costs those of docs/benchmark.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / 'projects' / name) for name in ('transfer_study', 'benchmark', 'glue')]

from glue.plan import read_records, result  # noqa: E402
from glue.report import finals as glue_finals  # noqa: E402
from mmengine import Config  # noqa: E402
from records import FLOOR, Result, read  # noqa: E402
from report import ratio  # noqa: E402
from transfer_study.methods import METHODS  # noqa: E402
from transfer_study.plan import finals, size_of  # noqa: E402
from transfer_study.report import CLAIMS, Elsewhere, also_run, elsewhere_table, scores  # noqa: E402
from transfer_study.trial import Trial  # noqa: E402

from mmpeft.analysis.seeds import Scores, below_best, differences, interval  # noqa: E402

PAGE = 'docs/which_method.md'
BEGIN = '<!-- written by docs/which_method_page.py from here -->'
END = '<!-- to here -->'
SEEDS = 5
RECORDS = sorted((ROOT / 'projects/transfer_study/records').glob('*.jsonl'))
VARIANTS = 'frozen', 'lora', 'flora', 'liera', 'dora', 'full'  # of the benchmark


class Study(NamedTuple):
    """Runs on one task from one backbone at one budget.

    Attributes:
        where: Task and backbone.
        budget: Parameters of the adapters, at most.
        scores: Test scores in points, by method and seed.
        parameters: That train in the backbone, by method.
        also_run: What was run at other settings than the chosen ones.
    """

    where: str
    budget: int
    scores: dict[str, Scores]
    parameters: dict[str, int]
    also_run: Sequence[Elsewhere] = ()

    @property
    def title(self) -> str:
        """Task, backbone and budget."""
        return f'{self.where}, at most {self.budget:,}'


def transfer_studies() -> Iterator[Study]:
    """One a task, backbone and budget of the records of projects/transfer_study."""
    for path in RECORDS:
        records = {r['id']: r for r in map(json.loads, path.read_text().splitlines())}
        trials = [Trial(**r['trial']) for r in records.values()]
        for budget in sorted({t.budget for t in trials if t.budget}):
            base = replace(trials[0], budget=budget)
            found = finished(scores(base, list(METHODS), SEEDS, records))
            counts = {m: finals(base, m, SEEDS, records)[0]['parameters'] for m in found}
            found = {m: s for m, s in found.items() if counts[m] <= budget or m == 'full'}
            if any(size_of(method)[0] for method in found):  # tuned for this budget
                also = also_run(base, list(METHODS), SEEDS, records)
                yield Study(f'{base.task}, {base.backbone}', budget, found, counts, also)


def finished(found: dict[str, Scores]) -> dict[str, Scores]:
    """The methods with all seeds; one that is still running would be compared on a part of them."""
    seeds = max(map(len, found.values()), default=0)
    return {method: each for method, each in found.items() if len(each) == seeds}


def glue_study() -> Study:
    """Sentiment of sentences from reviews, of projects/glue."""
    config = Config.fromfile(ROOT / 'projects/glue/configs/minilm_movies.py')
    records = read_records([ROOT / 'projects/glue/records/minilm_movies.jsonl'])
    found, counts = {}, {}
    for method in config['methods']:
        runs = glue_finals(config, 'movies', method, SEEDS, records)
        if runs:
            found[method] = {seed: 100 * result(r) for seed, r in runs.items()}
            counts[method] = next(iter(runs.values()))['parameters']
    return Study('sentiment of sentences, MiniLM', 166_464, found, counts)


def studies() -> list[Study]:
    """All that have final runs of a method with a budget."""
    return [*transfer_studies(), glue_study()]


def table(head: list[str], rows: list[list[str]]) -> str:
    """In Markdown."""
    lines = [f'| {" | ".join(head)} |', f'|{"---|" * len(head)}']
    return '\n'.join(lines + [f'| {" | ".join(row)} |' for row in rows])


def ranking(study: Study) -> str:
    """The methods of a study, best first, and which are shown to be below the best."""
    over = {d.better: d for d in differences(study.scores, [(m, 'frozen') for m in study.scores])}
    gaps = below_best(study.scores)
    below = {d.better: d for d in gaps}
    names = [gaps[0].worse, *below]
    rows = []
    for name in names:
        gain = f'{over[name].mean:+.2f} ± {over[name].half:.2f}' if name != 'frozen' else ''
        gap = 'the highest mean'
        if name in below:
            d = below[name]
            shown = 'shown' if d.verdict == 'lower' else 'not shown'
            gap = f'{d.mean:+.2f} ± {d.half:.2f}, {shown} ({d.p_value})'
        rows.append([name, f'{study.parameters[name]:,}', spread(study.scores[name]), gain, gap])
    head = ['method', 'parameters', 'score', 'over frozen', 'below the best']
    title = f'**{study.title} parameters in adapters**, {spans(study)}'
    lines = [title, '', table(head, rows), '', advice(study)]
    return '\n'.join(lines + elsewhere_table(study.also_run))


def spans(study: Study) -> str:
    """How many seeds the methods have."""
    counts = sorted({len(found) for found in study.scores.values()})
    return f'{" to ".join(map(str, {counts[0]: 0, counts[-1]: 0}))} seeds'


def advice(study: Study) -> str:
    """What is not shown to be below the best, fewest parameters first."""
    below = below_best(study.scores)
    level = [below[0].worse, *(d.better for d in below if d.verdict != 'lower')]
    level.sort(key=lambda name: study.parameters[name])
    if len(level) == 1:
        return f'{level[0]} is shown to be above all others.'
    listed = ', '.join(f'{name} ({study.parameters[name]:,})' for name in level)
    return f'Not shown to be below the best, fewest parameters first: {listed}.'


def budgets(found: list[Study]) -> str:
    """The methods that were tuned for several budgets, and the largest over the smallest."""
    parts = []
    for where in dict.fromkeys(study.where for study in found):
        by_budget = {study.budget: study for study in found if study.where == where}
        tuned = {budget: sized(study) for budget, study in by_budget.items()}
        names = [n for n in METHODS if sum(n in scores for scores in tuned.values()) > 1]
        if not names:
            continue
        runs, pairs, rows = {}, [], []
        for name in names:
            has = [budget for budget in tuned if name in tuned[budget]]
            runs |= {f'{name} {budget}': tuned[budget][name] for budget in has}
            pairs.append((f'{name} {max(has)}', f'{name} {min(has)}'))
        for name, gap in zip(names, differences(runs, pairs), strict=True):
            cells = [f'{name} {budget}' for budget in tuned]
            rows.append([name, *(spread(runs[cell]) if cell in runs else '' for cell in cells)])
            rows[-1].append(f'{gap.mean:+.2f} ± {gap.half:.2f} ({gap.p_value}), {gap.verdict}')
        head = ['method', *(f'{budget:,}' for budget in tuned), 'the largest over the smallest']
        parts += [f'**{where}**, by budget', table(head, rows)]
    return '\n\n'.join(parts)


def effort() -> str:
    """How many trials stand behind the tables, how long they took, and how many failed."""
    trials = [json.loads(line) for path in RECORDS for line in path.read_text().splitlines()]
    failed = sum(bool(trial['failed']) for trial in trials)
    hours = sum(trial['seconds'] for trial in trials) / 3600
    return (
        f'Behind the tables of images are {len(trials):,} trials, tuning included, of '
        f'{hours:.0f} core-hours. {failed or "None"} of them failed.'
    )


def sized(study: Study) -> dict[str, Scores]:
    """The scores of methods whose size depends on the budget."""
    return {name: scores for name, scores in study.scores.items() if size_of(name)[0]}


def spread(scores: Scores) -> str:
    """The mean over seeds, and half of its interval."""
    mean, half = interval(list(scores.values()))
    return f'{mean:.2f} ± {half:.2f}'


def claims(found: list[Study]) -> str:
    """The papers' orderings, and each as it was found; p-values adjusted over those of a study."""
    pairs = [(claim.better, claim.worse) for claim in CLAIMS]
    gaps = [
        (study.title, difference)
        for study in found
        for difference in differences(study.scores, pairs)
    ]
    rows = []
    for claim, pair in zip(CLAIMS, pairs, strict=True):
        cells = [f'{claim.better} over {claim.worse}', f'{claim.reported} ({claim.source})']
        rows += [
            [*cells, title, f'{d.mean:+.2f} ± {d.half:.2f} ({d.p_value})', d.verdict]
            for title, d in gaps
            if (d.better, d.worse) == pair
        ] or [[*cells, '', '', 'not run yet']]
    return table(['ordering', 'reported', 'tried on', 'found, points', 'verdict'], rows)


def measured() -> dict[str, dict[str, Result]]:
    """Training steps by network and device, then by variant."""
    record = ROOT / 'docs/benchmark/gpu_check_h100_2026-11-27.json'
    parts = json.loads(record.read_text())['parts']
    found = {}
    for run in read(ROOT / 'docs/benchmark/cpu_train.jsonl'):
        for r in run.results:
            found.setdefault(f'{r.text}, CPU', {})[r.variant] = r
    for name in ('convnextv2_large-1024', 'vit_large-224', 'resnet50-1333'):
        for r in (Result(**line) for line in parts[f'train-{name}']['results']):
            found.setdefault(f'{r.text}, H100', {})[r.variant] = r
    return found


def costs() -> str:
    """The step of each method over the floor's, and in brackets what is saved for backward."""
    networks = measured()
    rows = []
    for variant in VARIANTS:
        cells = []
        for results in networks.values():
            own, floor = results.get(variant), results[FLOOR]
            known = own is not None and own.rounds
            cells.append(
                f'{ratio(own.ratios(floor))} ({own.saved / floor.saved:.2f})' if known else ''
            )
        rows.append([variant, *cells])
    return table(['method', *networks], rows)


def tables() -> str:
    """What stands between the marks."""
    found = studies()
    return '\n\n'.join(
        [
            '## What each method gained',
            *map(ranking, found),
            budgets(found),
            effort(),
            '## What it costs',
            'The time of a training step, and in brackets the bytes saved for backward, as '
            "multiples of the frozen network's in torch; rank 16, all layers.",
            costs(),
            '## What the papers report, and what was found',
            claims(found),
        ]
    )


def document() -> str:
    """What the page should hold."""
    before, _, rest = (ROOT / PAGE).read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return f'{before}{BEGIN}\n\n{tables()}\n\n{END}{after}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--check', action='store_true', help='fail if it is out of date')
    check = parser.parse_args().check
    text = document()
    if check and (ROOT / PAGE).read_text() != text:
        raise SystemExit(f'Out of date: {PAGE}. Run python docs/which_method_page.py.')
    (ROOT / PAGE).write_text(text)


if __name__ == '__main__':
    main()
