"""Measure a training step with the adapters of each method, over the same network frozen.

    python projects/benchmark/measure.py --quick
    python projects/benchmark/measure.py [--workloads ...] [--variants ...] [--ranks 8 16 32]
    python projects/benchmark/measure.py --evaluate     # forward passes without gradients
    python projects/benchmark/measure.py --memory       # steps that keep more and less for backward

All variants of a workload step in turn in one process, A B C A B C ..., and
each is compared with the floor of the same round: the network frozen, with
gradients flowing to its input. Whatever slows the machine down for a while
slows all of them, and the ratios hardly move.

The results are lines of JSON in work_dirs/benchmark, complete after each step,
so that an interrupted run loses nothing. report.py makes tables and plots.
"""

import argparse
import gc
import signal
import sys
import time
from pathlib import Path

import torch
import variants
import workloads
from records import FLOOR, Result, Run, environment
from report import tables
from rich.console import Console
from rich.progress import Progress
from steps import Step

from mmpeft.engine.command_line import run
from mmpeft.errors import UsageError

AMP = dict(none=None, bfloat16=torch.bfloat16, float16=torch.float16)
EXPECTED = UsageError, torch.OutOfMemoryError


def main():
    args = parse_args()
    if args.device == 'cpu':
        torch.set_num_threads(args.threads)
    chosen = [workloads.find(name) for name in dict.fromkeys(args.workloads)]
    where = environment(args.device) | dict(amp=args.amp, seed=args.seed)
    done = Run('evaluate' if args.evaluate else 'memory' if args.memory else 'train', where)
    failed = []
    try:
        for workload in chosen:
            failed += measure(workload, args, done)
    except KeyboardInterrupt:
        print('\nInterrupted; this is what was measured.')
    print(tables([done]), f'\n{args.out}', sep='\n')
    if failed:
        sys.exit(f'\nmeasure.py: mmpeft failed: {", ".join(failed)}.')


def parse_args(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    free = ', or any timm network as MODEL:HEIGHTxWIDTH:BATCH'
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument('--evaluate', action='store_true', help='forward passes in evaluation mode')
    mode.add_argument('--memory', action='store_true', help="what is kept, by mmpeft's memory")
    add('--workloads', nargs='+', metavar='NAME', help=', '.join(workloads.WORKLOADS) + free)
    add('--variants', nargs='+', metavar='NAME', help=', '.join(variants.VARIANTS))
    add('--ranks', nargs='+', type=int, default=[16], metavar='R')
    add('--rounds', type=int, help='7, or 4 with --quick')
    add('--steps', type=int, help='of a variant in a round, whose median counts: 1, 5 on a GPU')
    add('--device', choices=['cpu', 'cuda'], help='a GPU if there is one')
    add('--threads', type=int, default=2, help='on a CPU')
    add('--amp', choices=AMP, help='autocast; none, bfloat16 on a GPU')
    add('--quick', action='store_true', help='within 3 minutes on 2 quiet cores')
    add('--seed', type=int, default=0)
    add('--out', type=Path, metavar='FILE', help='.jsonl that does not exist yet')
    args = parser.parse_args(arguments)
    has_gpu = torch.cuda.is_available()
    if args.device == 'cuda' and not has_gpu:
        raise UsageError('--device cuda: torch sees no GPU here.')
    args.device = args.device or ('cuda' if has_gpu else 'cpu')
    on_cpu = args.device == 'cpu'
    args.workloads = args.workloads or workloads.names(args.device, args.quick)
    usual = variants.MEMORY if args.memory else variants.QUICK if args.quick else variants.ALL
    args.variants = args.variants or usual
    args.rounds = args.rounds or (4 if args.quick else 7)
    args.steps = args.steps or (1 if on_cpu else 5)
    args.amp = args.amp or ('none' if on_cpu else 'bfloat16')
    args.out = args.out or Path(f'work_dirs/benchmark/{time.strftime("%Y%m%d_%H%M%S")}.jsonl')
    for name in args.variants:
        variants.check_name(name)
    if min(args.ranks) < 1:
        raise UsageError(f'--ranks: {min(args.ranks)} is less than 1.')
    if args.out.exists():
        raise UsageError(f'--out: {str(args.out)!r} exists already. Name another file.')
    return args


def measure(workload, args, done: Run) -> list[str]:
    """Measure variants on a workload; the file is written after every step of each.

    Args:
        workload: What to train.
        args: Of the command line.
        done: Gets the results.

    Returns:
        What of mmpeft failed unexpectedly.
    """
    gc.collect()  # some peers hold themselves in cycles
    if args.device != 'cpu':
        torch.cuda.empty_cache()
    network = workload.build(args.device, args.seed)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    entries = [
        Result(workload.name, workload.text, parameters, name, rank)
        for name in dict.fromkeys((FLOOR, *args.variants))
        for rank in ([None] if name in variants.WITHOUT_RANK else args.ranks)
    ]
    steps, failed = [], []
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(workload.name, total=len(entries) * (args.rounds + 1))
        for result in entries:
            bar.update(task, advance=1, description=f'{workload.name}: {result.name}')
            try:
                step = prepare(workload, network, result, args)
                vars(result).update(step.survey())
                steps.append((result, step))
            except Exception as error:
                expected = isinstance(error, EXPECTED)
                first = str(error).partition('\n')[0].rstrip('.')
                result.skipped = first if expected else f'{type(error).__name__}: {first}'
                # That a peer cannot train a network is a result as well.
                if not expected and not variants.package_of(result.variant):
                    failed.append(f'{result.name} on {workload.name}')
            done.results.append(result)
            done.save(args.out)
        if entries[0].skipped:
            print(f'{workload.name}: the floor was skipped, {entries[0].skipped}.')
            return failed
        for result in in_turn(steps, args.rounds, args.steps):
            bar.update(task, advance=1, description=f'{workload.name}: {result.name}')
            done.save(args.out)
    return failed


def prepare(workload, network, result: Result, args) -> Step:
    """A variant, ready to take steps."""
    model = variants.build(result.variant, network, result.rank)
    return Step(
        model,
        workload.batch(args.device),
        args.device,
        AMP[args.amp],
        is_inner=workload.is_inner,
        evaluates=args.evaluate,
    )


def in_turn(steps, rounds: int, times: int = 1):
    """Call all steps, one after the other, as often as there are rounds, and note the seconds.

    Yields:
        The result to which seconds were added.
    """
    gc.collect()
    gc.freeze()  # the other variants' modules, which no training has beside its own
    for _ in range(rounds):
        for result, step in steps:
            for phase, seconds in step.median_of(times).items():
                result.rounds.setdefault(phase, []).append(round(seconds, 6))
            yield result
    gc.unfreeze()


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run(main)
