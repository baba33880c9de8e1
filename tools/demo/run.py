"""Adapt a frozen ConvNeXt-V2 to scenes of handwritten digits, from data to report.

    python tools/demo/run.py [--method flora] [--task coco] [--seed 0]

Makes the data, trains the base on single digits, then trains two models on it
that differ in one thing: in one the backbone is frozen, in the other it is
adapted. What is there already is not made again, so that a second call takes
seconds and an interrupted one goes on where it was.
"""

import argparse
import os
import signal
import subprocess
import sys

from experiment import CONFIGS, DATA, TOOLS, WORK, Experiment
from jobs import run_jobs
from report import show_report


def main():
    args = parse_args()
    avoid_gpu_without_operators()
    call('dataset_converters/digits.py', '--out', DATA)
    call('demo/base.py', '--data', DATA / 'source', '--out', WORK / 'base.pth')
    adapted = Experiment(args.method, args.task, args.seed)
    experiments = [Experiment('frozen', args.task, args.seed), adapted]
    if args.method == 'frozen':
        experiments.pop()
    for experiment in experiments:
        experiment.prepare()
    run_jobs([e.training() for e in experiments if not e.is_trained()])
    if not adapted.merged.exists():
        run_jobs([adapted.merging()])
    evaluations = [*(e.evaluation() for e in experiments), adapted.evaluation_of_merged()]
    run_jobs([evaluation.job() for evaluation in evaluations if not evaluation.is_done()])
    show_report(experiments)


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [path.stem.split('_') for path in sorted(CONFIGS.glob('*.py'))]
    parser.add_argument('--method', default='flora', choices=sorted({name for name, _ in known}))
    parser.add_argument('--task', default='coco', choices=sorted({name for _, name in known}))
    parser.add_argument('--seed', type=int, default=0, help='of heads, adapters and batches')
    args = parser.parse_args()
    if [args.method, args.task] not in known:
        parser.error(f'there is no configs/demo/{args.method}_{args.task}.py yet; add it')
    return args


def avoid_gpu_without_operators():
    """Run on the CPU where mmcv was compiled without CUDA."""
    from mmcv.ops import get_compiling_cuda_version

    if get_compiling_cuda_version() == 'not available':
        os.environ['CUDA_VISIBLE_DEVICES'] = ''


def call(tool, *arguments):
    """Run a tool to its end.

    Raises:
        SystemExit: It failed.
    """
    command = [sys.executable, TOOLS / tool, *arguments]
    code = subprocess.run([str(part) for part in command]).returncode
    if code:
        raise SystemExit(code)


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit('\nInterrupted. The same command goes on from here.')
