"""Adapt a frozen ConvNeXt-V2 to scenes of handwritten digits, from data to report.

    python projects/demo/run.py [--method flora] [--task coco] [--seed 0]

Makes the data, trains the base on single digits, then trains two models on it
that differ in one thing: in one the backbone is frozen, in the other it is
adapted. What exists already is not made again, so that a second call takes
seconds and an interrupted one goes on where it was.
"""

import argparse
import os
import signal
import sys

from demo_report import show_report
from experiment import TASKS, Experiment, make_data_and_base, methods
from jobs import run_jobs

from mmpeft.engine.launch import run


def main():
    args = parse_args()
    names = dict.fromkeys(['frozen', args.method])
    experiments = [Experiment(name, args.task, args.seed) for name in names]
    adapted = experiments[-1]
    avoid_gpu_without_operators()
    make_data_and_base(args.task)
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
    parser.add_argument('--method', default='flora', help=', '.join(methods()))
    parser.add_argument('--task', default='coco', help=', '.join(TASKS))
    parser.add_argument('--seed', type=int, default=0, help='of heads, adapters and batches')
    return parser.parse_args()


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
