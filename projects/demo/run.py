"""Adapt a frozen backbone to scenes that it has never seen, from data to report.

    python projects/demo/run.py [--data digits] [--method flora] [--task coco] [--seed 0]

Makes the scenes, of handwritten digits or of photos; trains a small ConvNeXt-V2
on single digits, or takes a pretrained EfficientNet-Lite0; then trains two models
on it that differ in one thing: in one the backbone is frozen, in the other it is
adapted. What exists already is not made again, so that a second call takes
seconds and an interrupted one goes on where it was.
"""

import argparse
import os
import signal
import sys

from demo_report import show_report, summary_of
from experiment import DEFAULTS, TASKS, WORK, Experiment, make_data_and_base, methods
from jobs import alone, run_jobs

from mmpeft.engine.command_line import run
from mmpeft.errors import UsageError


def main():
    args = parse_args()
    names = dict.fromkeys(['frozen', args.method])
    experiments = [Experiment(name, args.task, args.seed, args.data) for name in names]
    avoid_gpu_without_operators()
    summary_of(experiments[-1].cfg)  # raises where the method does not fit
    with alone(WORK / 'lock'):
        demonstrate(args, experiments)


def demonstrate(args, experiments):
    """Make what does not exist yet of data, base and experiments, and print the report."""
    adapted = experiments[-1]
    make_data_and_base(args.task, args.data, pictures_of(args))
    for experiment in experiments:
        experiment.prepare()
    run_jobs([e.training() for e in experiments if not e.is_trained()])
    run_jobs([e.merging() for e in experiments if e.merges and not e.merged.exists()])
    tests = [(e, False) for e in experiments] + [(adapted, True)] * adapted.merges
    run_jobs([e.testing(merged) for e, merged in tests if not e.scores(merged)])
    show_report(experiments)


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--method', help=', '.join(methods()))
    parser.add_argument('--data', default='digits', help=' or '.join(TASKS))
    parser.add_argument('--task', default='coco', help=', '.join(TASKS['digits']))
    parser.add_argument('--seed', type=seed, default=0, help='of heads, adapters and batches')
    parser.add_argument('--cutouts', help='of --data photos: see photos.py')
    parser.add_argument('--photographs', help='of --data photos: see photos.py')
    args = parser.parse_args()
    args.method = args.method or DEFAULTS.get(args.data, 'flora')
    return args


def seed(text):
    """A seed as numpy takes it, from the command line."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f'{text!r} is not an integer from 0 to {2**32 - 1}')
    return int(text)


def pictures_of(args):
    """The arguments of photos.py among those of this script.

    Raises:
        UsageError: They are given for other data.
    """
    given = {name: getattr(args, name) for name in ('cutouts', 'photographs')}
    given = {name: value for name, value in given.items() if value}
    if given and args.data != 'photos':
        raise UsageError(f'--{next(iter(given))} is for --data photos.')
    return tuple(word for name, value in given.items() for word in (f'--{name}', value))


def avoid_gpu_without_operators():
    """Run on the CPU where mmcv was compiled without CUDA."""
    from mmcv.ops import get_compiling_cuda_version

    if get_compiling_cuda_version() == 'not available':
        os.environ['CUDA_VISIBLE_DEVICES'] = ''


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(main)
    except KeyboardInterrupt:
        sys.exit('\nInterrupted. The same command goes on from here.')
