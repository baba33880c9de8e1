"""Tables and plots of what measure.py has measured.

    python projects/benchmark/report.py work_dirs/benchmark/*.jsonl
    python projects/benchmark/report.py docs/benchmark/*.jsonl \\
        --markdown docs/performance.md --plots docs/images

Runs of several machines or settings may be given together; of equal workloads
the last one counts.
"""

import argparse
from pathlib import Path

from growth import Curves, by_rank, by_size, single
from records import FLOOR, MEASURES, PHASES, Result, by_workload, median, quartiles, read

from mmpeft.engine.command_line import run
from mmpeft.errors import UsageError

BEGIN, END = '<!-- written by projects/benchmark/report.py from here -->', '<!-- to here -->'
# The figures that matter most: what, over what, and by which measure.
COMPARED = (
    ('frozen, mmpeft over torch', 'frozen', FLOOR, 'step'),
    ('FLoRA on all layers over the floor', 'flora', FLOOR, 'step'),
    ('LoRA on all layers over the floor', 'lora', FLOOR, 'step'),
    ('DoRA on all layers over the floor', 'dora', FLOOR, 'step'),
    ('LieRA on all layers over full fine-tuning', 'liera', 'full', 'step'),
    ('LieRA, exact over first order', 'liera_exact', 'liera', 'step'),
    ("FLoRA on all layers over peft's LoRA on matrices", 'flora', 'peft_lora', 'step'),
    ("FLoRA on all layers over peft's LoRA on matrices, saved", 'flora', 'peft_lora', 'saved'),
    ("LoRA on matrices over peft's, saved", 'lora_linear', 'peft_lora', 'saved'),
)


def main():
    args = parse_args()
    runs = [run for path in args.files for run in read(path)]
    text = tables(runs)
    print(text)
    if args.markdown:
        write_between_marks(args.markdown, text)
    if args.plots:
        from plots import draw

        print(*draw(runs, args.plots), sep='\n')


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('files', type=Path, nargs='+', metavar='FILE')
    parser.add_argument('--markdown', type=Path, help='write the tables between its marks, or anew')
    parser.add_argument('--plots', type=Path, metavar='FOLDER', help='draw PNG files into it')
    return parser.parse_args()


def tables(runs) -> str:
    """All tables as Markdown: of each workload, of all together, of the growth."""
    training, evaluated = by_workload(runs), by_workload(runs, 'evaluate')
    memory = by_workload(runs, 'memory')
    alone = single(training)
    times = {}
    for each in runs:
        times.setdefault(each.machine(), []).append(each.time())
    blocks = [f'{machine}; {", ".join(when)}.' for machine, when in times.items()]
    blocks += [step_table(results) for results in alone.values()]
    blocks += [evaluation_table(evaluated)] if evaluated else []
    blocks += [comparison(alone)] if len(alone) > 1 else []
    blocks += [curves_table(curves) for curves in by_rank(training) + by_size(training)]
    for measure in MEASURES:
        blocks += [memory_table(single(memory), measure)] if single(memory) else []
        grown = by_rank(memory, measure) + by_size(memory, measure)
        blocks += [curves_table(curves) for curves in grown]
    return '\n\n'.join(blocks)


def step_table(results: dict[str, Result]) -> str:
    """All figures of a workload."""
    floor = results[FLOOR]
    cells = {
        'trains, M': lambda r: f'{r.trained / 1e6:.2f}',
        'step': lambda r: spread(r.ratios(floor)),
        'forward': lambda r: ratio(r.ratios(floor, ['forward'])),
        'backward': lambda r: ratio(r.ratios(floor, ['backward'])),
        '+ optimizer': lambda r: ratio(r.ratios(floor, PHASES)),
        'ms': lambda r: f'{median(r.seconds()) * 1e3:,.1f}',
        'saved, MiB': lambda r: amount(r.saved, 2**20),
        'GFLOP': lambda r: amount(r.operations, 1e9),
        'peak, MiB': lambda r: amount(r.peak, 2**20),
    }
    if floor.peak is None:
        del cells['peak, MiB']
    rows = [[r.name, *(c(r) for c in cells.values())] for r in results.values() if r.rounds]
    title = f'{floor.workload}: {floor.text}; {floor.parameters / 1e6:.1f} M parameters'
    notes = [f'{r.name}: skipped, {r.skipped}.' for r in results.values() if r.skipped]
    return table(title, ['', *cells], rows, notes)


def evaluation_table(workloads: dict[str, dict[str, Result]]) -> str:
    """A forward pass without gradients over the floor's; on a GPU its peak memory too."""

    def cell(own, floor):
        if own.name == FLOOR:
            return f'{median(own.seconds()) * 1e3:,.1f} ms'
        return spread(own.ratios(floor)) + (f' ({own.peak / floor.peak:.2f})' if own.peak else '')

    title = "evaluation: a forward pass over the floor's, whose milliseconds are in the first row"
    if any(results[FLOOR].peak for results in workloads.values()):
        title += '; in brackets memory at the peak'
    return variants_table(title, workloads, cell)


def comparison(workloads: dict[str, dict[str, Result]]) -> str:
    """The figures that matter most, of all workloads."""
    rows = [
        [text, *(compare(results, *how) for results in workloads.values())]
        for text, *how in COMPARED
    ]
    title = 'compared; saved: the bytes kept for backward'
    return table(title, ['', *workloads], [row for row in rows if any(row[1:])])


def compare(results: dict[str, Result], of: str, to: str, measure: str) -> str:
    """One figure; empty where one of the two was not measured."""
    found = {result.variant: result for result in results.values() if result.rounds}
    if of not in found or to not in found:
        return ''
    if measure == 'step':
        return ratio(found[of].ratios(found[to]))
    return f'{found[of].saved / found[to].saved:.2f}'


def memory_table(workloads: dict[str, dict[str, Result]], measure: str) -> str:
    """The step, or what is saved for backward, over the floor's."""
    title = f"{MEASURES[measure]} over the floor's, by memory"
    return variants_table(title, workloads, lambda own, floor: f'{own.over(floor, measure):.2f}')


def variants_table(title: str, workloads: dict[str, dict[str, Result]], cell) -> str:
    """A row a variant and a column a workload; ``cell(own, floor)`` says what is in it."""
    names = dict.fromkeys(name for results in workloads.values() for name in results)

    def text(results, name):
        own = results.get(name)
        return cell(own, results[FLOOR]) if own and own.rounds else ''

    rows = [[name, *(text(results, name) for results in workloads.values())] for name in names]
    skipped = {r.name: r.skipped for each in workloads.values() for r in each.values() if r.skipped}
    notes = [f'{name}: skipped, {why}.' for name, why in skipped.items()]
    return table(title, ['', *workloads], [row for row in rows if any(row[1:])], notes)


def curves_table(curves: Curves) -> str:
    """The step over the floor, one row a variant and one column a rank or size."""
    points = curves.points()
    rows = [
        [name, *(f'{line[x]:.2f}' if x in line else '' for x in points)]
        for name, line in curves.lines.items()
    ]
    title = f'{curves.measure} over the floor by {curves.label}: {curves.title}'
    return table(title, ['', *(f'{x:g}' for x in points)], rows)


def table(title: str, columns: list[str], rows: list[list[str]], notes=()) -> str:
    """A Markdown table that is aligned for a terminal, too."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]

    def line(cells):
        padded = [cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]
        return f'| {" | ".join(padded)} |'

    rule = ['-' * max(widths[0], 3), *('-' * max(width - 1, 3) + ':' for width in widths[1:])]
    lines = [f'**{title}**', '', line(columns), f'| {" | ".join(rule)} |', *map(line, rows)]
    return '\n'.join(lines + [f'\n{note}' for note in notes])


def amount(value: int | None, unit: float) -> str:
    """A number in a unit; empty where there is none."""
    return '' if value is None else f'{value / unit:,.1f}'


def ratio(values: list[float]) -> str:
    """The median."""
    return f'{median(values):.2f}' if values else ''


def spread(values: list[float]) -> str:
    """The median and half the distance of the quartiles."""
    low, high = quartiles(values)
    return f'{ratio(values)} ±{(high - low) / 2:.2f}'


def write_between_marks(path: Path, text: str) -> None:
    """Put the tables between the marks of a document, or into a new one.

    Raises:
        UsageError: The file has no marks.
    """
    whole = path.read_text() if path.exists() else f'{BEGIN}\n{END}\n'
    before, begin, rest = whole.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UsageError(
            f'--markdown: {str(path)!r} has no place for the tables. Put the lines {BEGIN!r} and '
            f'{END!r} where they belong, or name a file that does not exist.'
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{before}{begin}\n\n{text}\n\n{end}{after}')


if __name__ == '__main__':
    run(main)
