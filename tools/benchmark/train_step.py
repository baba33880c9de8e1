"""How long a training step takes with an adapter, over the same network frozen.

    python tools/benchmark/train_step.py --quick
    python tools/benchmark/train_step.py [--workloads ...] [--variants ...] [--ranks 8 16 32]
    python tools/benchmark/train_step.py --report FILE.json ... --markdown docs/performance.md

All variants of a workload step in turn in one process, and each is compared
with the floor of the same round: the network frozen, with gradients flowing to
its input. The table, a JSON file and a plot go to work_dirs/benchmark; the
JSON file holds every figure as soon as it is there.
"""

import argparse
import signal
import sys
from pathlib import Path

import records
import torch
import variants
import workloads
from grids import Grid, write_document
from measuring import AMP, measure_workload
from plots import draw
from step_tables import goal_grid, workload_grid
from terminal import show

from mmpeft.engine.launch import run
from mmpeft.errors import UsageError

TOOL = 'train_step'
QUICK_WORKLOADS = dict(
    cpu=('convnextv2_base-160', 'resnet50-320'),
    cuda=('convnextv2_base-512', 'internvit_1024-gpu'),
)


def main():
    args = parse_args()
    if args.list:
        return show_choices()
    if args.report:
        data = merged([records.read(path, TOOL) for path in args.report])
        show(data['described'], *map(workload_grid, data['workloads'].values()))
    else:
        data = measure(args)
    conclude(data, args)
    failed = [name for result in data['workloads'].values() for name in result['failed']]
    if failed:
        sys.exit(f'\n{TOOL}.py: mmpeft failed: {", ".join(failed)}.')


def parse_args(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--workloads', nargs='+', metavar='NAME', help='see --list')
    parser.add_argument(
        '--variants', nargs='+', metavar='NAME', help='see --list; all if not given'
    )
    parser.add_argument('--ranks', nargs='+', type=int, default=[16], metavar='R')
    parser.add_argument('--rounds', type=int, help='7, or 4 with --quick')
    parser.add_argument(
        '--steps', type=int, help='of a variant in a round, of which the median counts: 1, 5 on GPU'
    )
    parser.add_argument('--device', choices=['cpu', 'cuda'], help='a GPU if there is one')
    parser.add_argument('--threads', type=int, default=2, help='on a CPU')
    parser.add_argument('--amp', choices=AMP, help='autocast; none, bfloat16 on a GPU')
    parser.add_argument(
        '--optimizer',
        choices=['adamw', 'none'],
        default='adamw',
        help='step it too; the ratios are given with it and without',
    )
    parser.add_argument('--quick', action='store_true', help='within 3 minutes on 2 quiet cores')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument(
        '--out', type=Path, default=Path('work_dirs/benchmark/train_step.json'), metavar='FILE'
    )
    parser.add_argument(
        '--markdown', type=Path, metavar='FILE', help='write the tables between its marks, or anew'
    )
    parser.add_argument(
        '--report', type=Path, nargs='+', metavar='FILE', help='measure nothing; show these results'
    )
    parser.add_argument('--list', action='store_true', help='show workloads and variants')
    args = parser.parse_args(arguments)
    complete(args)
    return args


def complete(args):
    """Fill in what was not given, from the device and ``--quick``."""
    has_gpu = torch.cuda.is_available()
    if args.device == 'cuda' and not has_gpu:
        raise UsageError('--device cuda: torch sees no GPU here.')
    args.device = args.device or ('cuda' if has_gpu else 'cpu')
    on_cpu = args.device == 'cpu'
    quick = list(QUICK_WORKLOADS[args.device]) if args.quick else None
    args.workloads = args.workloads or quick or workloads.defaults(args.device)
    args.variants = args.variants or list(variants.QUICK if args.quick else variants.VARIANTS)
    args.rounds = args.rounds or (4 if args.quick else 7)
    args.steps = args.steps or (1 if on_cpu else 5)
    args.amp = args.amp or ('none' if on_cpu else 'bfloat16')
    for name, values in dict(ranks=args.ranks, rounds=[args.rounds], steps=[args.steps]).items():
        if min(values) < 1:
            raise UsageError(f'--{name}: {min(values)} is less than 1.')
    if args.out.suffix != '.json':
        raise UsageError(f'--out: {str(args.out)!r} must end in .json.')


def show_choices():
    """Print what ``--workloads`` and ``--variants`` take."""
    grid = Grid('workloads', ('name', 'what', 'measured on'))
    for name, workload in workloads.WORKLOADS.items():
        device = 'CPU' if name in workloads.FOR_CPU else 'GPU'
        grid.rows.append((name, workload.text, device))
    grid.rows.append(('MODEL:HEIGHTxWIDTH:BATCH', 'any timm network', ''))
    show(grid)
    grid = Grid('variants', ('name', 'what', ''))
    for name, variant in variants.VARIANTS.items():
        marks = ['quick'] if name in variants.QUICK else []
        marks += [] if variant.is_available else [f'needs {variant.needs}']
        grid.rows.append((name, variant.text, ', '.join(marks)))
    show(grid)


def measure(args) -> dict:
    """Run the benchmark; what is measured when it is interrupted is kept and shown."""
    chosen = [workloads.find(name) for name in dict.fromkeys(args.workloads)]
    compared = [variants.find(name) for name in dict.fromkeys([variants.FLOOR, *args.variants])]
    if args.device == 'cpu':
        torch.set_num_threads(args.threads)
    asked = {k: v for k, v in vars(args).items() if k not in ('out', 'markdown', 'report', 'list')}
    there = records.environment(args.device)
    data = dict(tool=TOOL, environment=there, arguments=asked, workloads={})
    data['described'] = records.described(data)
    record = records.Record(args.out, data)
    show(data['described'])
    for workload in chosen:
        try:
            measure_workload(workload, compared, args, record)
        except KeyboardInterrupt:
            data['interrupted'] = True
            show('\nInterrupted; this is what was measured.')
        record.save()
        if workload.name in data['workloads']:
            show(workload_grid(data['workloads'][workload.name]))
        if data.get('interrupted'):
            break
    return data


def merged(runs) -> dict:
    """What several runs have measured; of equal workloads the last stays."""
    data = dict(workloads={}, described='\n\n'.join(run['described'] for run in runs))
    for one in runs:
        data['workloads'] |= one['workloads']
    return data


def conclude(data, args):
    """Goals, plot and document, of whatever there is."""
    goals = goal_grid(data)
    if goals.rows:
        show(goals)
    files = draw(data, args.out.with_suffix('.png'))
    if not args.report:
        files.insert(0, args.out)
    if args.markdown:
        grids = [*map(workload_grid, data['workloads'].values())]
        grids += [goals] if goals.rows else []
        text = '\n\n'.join([data['described'], *(grid.markdown() for grid in grids)])
        write_document(args.markdown, TOOL, text)
        files.append(args.markdown)
    show(*files)


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run(main)
