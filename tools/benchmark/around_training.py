"""What adapters cost around the training steps: in evaluation, in injection, at start-up.

    python tools/benchmark/around_training.py [--parts inference injection startup hook]

Each part measures its entries in turn, in rounds, and compares them with a
base of the same round, as train_step.py does. The table and a JSON file go to
work_dirs/benchmark.
"""

import argparse
import signal
from pathlib import Path

import inference
import injection
import records
import runner_start
import startup
import torch
import variants
import workloads
from grids import Grid, milliseconds, ratio, write_document
from rounds import in_turn, ratios, spread, totals
from terminal import progress, show

from mmpeft.engine.launch import run
from mmpeft.errors import UsageError

TOOL = 'around_training'
PARTS = dict(inference=inference, injection=injection, startup=startup, hook=runner_start)
METHODS = ('flora', 'lora', 'dora', 'liera')


def main():
    args = parse_args()
    if args.device == 'cpu':
        torch.set_num_threads(args.threads)
    asked = {k: v for k, v in vars(args).items() if k not in ('out', 'markdown')}
    there = records.environment(args.device)
    data = dict(tool=TOOL, environment=there, arguments=asked, parts={})
    data['described'] = records.described(data)
    record = records.Record(args.out, data)
    show(data['described'])
    workload = workloads.find(args.workload)
    try:
        for name in args.parts:
            measure(name, workload, args, record)
    except KeyboardInterrupt:
        show('\nInterrupted; this is what was measured.')
    grids = [grid for part in data['parts'].values() if (grid := grid_of(part)).rows]
    show(*grids, args.out)
    if args.markdown:
        text = '\n\n'.join([data['described'], *(grid.markdown() for grid in grids)])
        write_document(args.markdown, TOOL, text)


def parse_args(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    has_gpu = torch.cuda.is_available()
    parser.add_argument('--parts', nargs='+', choices=PARTS, default=list(PARTS))
    parser.add_argument('--workload', help="of train_step.py; its device's first")
    parser.add_argument('--variants', nargs='+', default=METHODS, help='of mmpeft')
    parser.add_argument('--rank', type=int, default=16)
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cuda' if has_gpu else 'cpu')
    parser.add_argument('--threads', type=int, default=2, help='on a CPU')
    parser.add_argument(
        '--out', type=Path, default=Path('work_dirs/benchmark/around_training.json')
    )
    parser.add_argument(
        '--markdown', type=Path, metavar='FILE', help='write the tables between its marks, or anew'
    )
    args = parser.parse_args(arguments)
    if args.device == 'cuda' and not has_gpu:
        raise UsageError('--device cuda: torch sees no GPU here.')
    args.amp = 'none' if args.device == 'cpu' else 'bfloat16'
    args.workload = args.workload or workloads.defaults(args.device)[0]
    for name in args.variants:
        if not variants.find(name).hook:
            raise UsageError(f'--variants: {name!r} is none of the methods of mmpeft.')
    return args


def measure(name, workload, args, record):
    """Measure a part; the record is written after every entry of every round."""
    part = PARTS[name]
    result = dict(text=part.TEXT.format(workload=workload.text), base=part.BASE, entries={})
    record.data['parts'][name] = result
    compared = [variants.find(variant) for variant in args.variants]
    entries = part.entries(workload, compared, args.rank, args.device)
    result['entries'] = {entry: dict(rounds=[]) for entry in entries}
    with progress(name, len(entries) * (args.rounds + 1)) as advance:
        for entry, step in entries.items():
            advance(f'{entry}, warming up', 0)
            step()
            advance(entry, 1)
        for entry, phases in in_turn(entries, args.rounds):
            result['entries'][entry]['rounds'].append(phases)
            summarize(result)
            record.save()
            advance(entry, 1)


def summarize(part) -> None:
    """Add medians and ratios to the base to all entries of a part, in place."""
    base = part['entries'][part['base']]['rounds']
    for entry in part['entries'].values():
        phases = set().union(*entry['rounds'])
        entry['seconds'] = spread(totals(entry['rounds'], phases))
        entry['ratio'] = spread(ratios(entry['rounds'], base, phases))


def grid_of(part) -> Grid:
    """The table of a part."""
    grid = Grid(part['text'], ('', f'over {part["base"]}', 'ms'))
    for name, entry in part['entries'].items():
        if entry['rounds']:
            of_base = ratio(entry['ratio'], with_spread=True)
            grid.rows.append((name, of_base, milliseconds(entry['seconds'])))
    return grid


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run(main)
