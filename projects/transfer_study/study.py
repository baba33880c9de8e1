"""Plan, run and report the study.

    python projects/transfer_study/study.py run --workers 2
    python projects/transfer_study/study.py report
    python projects/transfer_study/study.py again --count 3

A run can be stopped and started again: each trial appends one line to the records when it ends,
and what has a line is not run again. Several workers, also on several machines with one file
system, divide the trials among themselves.
"""

import argparse
import copy
import fcntl
import importlib.metadata
import math
import os
import random
import subprocess
import sys
import time
import traceback
import warnings
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import submitit
import torch
from torch import nn
from transfer_study import report
from transfer_study.backbones import BACKBONES
from transfer_study.classification import sized
from transfer_study.methods import MAIN, METHODS
from transfer_study.plan import elsewhere, pending, size_of, tuned
from transfer_study.tasks import TASKS, run_trial
from transfer_study.trial import Trial

import mmpeft
from mmpeft.checkpoint.journal import append_record, read_journal
from mmpeft.errors import UsageError

FOLDER = Path(__file__).parent
PACKAGES = ('torch', 'timm', 'numpy')


def read_records(path: Path) -> dict[str, dict]:
    """The records of a file by the ids of their trials."""
    return {record['id']: record for record in read_journal(path)}


@contextmanager
def claimed(folder: Path, trial: Trial):
    """Whether this worker may run a trial: no other one that lives is at it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / trial.id).open('w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def versions() -> dict[str, str]:
    """What a record has to name so that it can be made again."""
    commit = ['git', 'describe', '--always', '--dirty']
    done = subprocess.run(commit, cwd=FOLDER, capture_output=True, text=True)
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return found | dict(mmpeft=done.stdout.strip() or importlib.metadata.version('mmpeft'))


def left(args: argparse.Namespace, records: dict[str, dict]) -> list[Trial]:
    """The trials without a record that can start."""
    if args.at:
        return list(elsewhere(args.base, args.methods, args.seeds, records, args.at))
    return list(pending(args.base, args.methods, args.seeds, records))


def work(args: argparse.Namespace) -> None:
    """Run trials until none is left that can start."""
    stamp = versions()
    while True:
        records = read_records(args.records)
        waiting = left(args, records)
        if not waiting:
            return
        for trial in waiting:
            with claimed(args.claims, trial) as mine:
                if not mine or trial.id in read_records(args.records):
                    continue
                record = dict(id=trial.id, trial=asdict(trial), versions=stamp)
                record |= run_trial(trial) | dict(date=time.strftime('%Y-%m-%d'))
                append_record(args.records, record)
                score = record['failed'] or f'{record[TASKS[trial.task].metric]:.4f}'
                print(f'{len(records) + 1:>5} {describe(trial)}: {score}', flush=True)
                break
        else:
            time.sleep(5)  # others are at the last trials of a stage


def describe(trial: Trial) -> str:
    """A trial in one line."""
    heads = trial.ridge if trial.head_rate is None else trial.head_rate
    setting = f'rate {trial.rate:g}, scale {trial.scale:g}, heads {heads:g}, seed {trial.seed}'
    return f'{trial.method:<14} {trial.stage:<5} {trial.epochs:>2} epochs, {setting}'


def run(args: argparse.Namespace) -> None:
    """Work in this process and in as many others as there are workers more."""
    command = [sys.executable, *sys.argv]
    others = [
        subprocess.Popen([*command, '--workers', '1'], env=os.environ | dict(OMP_NUM_THREADS='1'))
        for _ in range(args.workers - 1)
    ]
    try:
        work(args)
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None
    finally:
        statuses = [process.wait() for process in others]
    if any(statuses):
        raise SystemExit(f'{sum(map(bool, statuses))} workers failed; see above.')


def submit(args: argparse.Namespace) -> None:
    """Hand the workers to Slurm, which runs them when this process has ended.

    Raises:
        SystemExit: This machine submits no jobs to Slurm.
    """
    logs = args.claims / 'slurm'
    try:
        executor = submitit.AutoExecutor(logs, cluster='slurm')
        executor.update_parameters(
            name='transfer_study',
            slurm_partition=args.slurm,
            timeout_min=60 * args.hours,
            cpus_per_task=1,
            mem_gb=4,
        )
        with executor.batch():
            jobs = [executor.submit(work, args) for _ in range(args.workers)]
    except (RuntimeError, submitit.core.utils.FailedJobError) as error:
        raise SystemExit(f'Slurm took no job for the partition {args.slurm!r}: {error}') from None
    print(f'{len(jobs)} workers are the job {jobs[0].job_id.partition("_")[0]}, logs in {logs}.')


def again(args: argparse.Namespace) -> None:
    """Run some trials that have records again, and print both scores."""
    records = read_records(args.records)
    known = [record for _, record in sorted(records.items()) if not record['failed']]
    for record in random.Random(args.draw).sample(known, min(args.count, len(known))):
        trial = Trial(**record['trial'])
        new = run_trial(trial)
        before, now = (r[TASKS[trial.task].metric] for r in (record, new))
        both = f'{before:.4f}, now {now:.4f} ({100 * (now - before):+.2f} points)'
        print(f'{trial.id} {describe(trial)}: {both}', flush=True)


def amount(text: str) -> int | float:
    """A number of parameters, or the share that a percentage stands for."""
    value = float(text[:-1]) / 100 if text.endswith('%') else int(text)
    if value <= 0:
        raise ValueError
    return value


def setting(text: str) -> tuple[str, int | float]:
    """``'rate=3e-3'`` as an argument of a trial."""
    key, _, value = text.partition('=')
    if key not in ('epochs', 'rate', 'scale'):
        raise ValueError
    return key, int(value) if key == 'epochs' else float(value)


def fitting(base: Trial, methods: list[str]) -> list[str]:
    """The methods that the budget allows; prints which ones it does not, and why."""
    with torch.device('meta'):
        net = nn.Sequential(OrderedDict(features=BACKBONES[base.backbone].make(None)))
    fit = []
    for method in methods:
        probe, trial = copy.deepcopy(net), replace(base, method=method)
        try:
            if size_of(method)[0]:
                mmpeft.inject(probe, *sized(METHODS[method], trial, probe))
        except UsageError as error:
            print(f'{method} is left out: {error}', flush=True)
        else:
            fit.append(method)
    return fit


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('command', choices=('run', 'report', 'status', 'again'))
    parser.add_argument('--task', choices=TASKS, default='fashion_mnist_1k')
    parser.add_argument('--backbone', choices=BACKBONES, help="the task's first, if out")
    parser.add_argument('--size', type=int, help="side of the images, pixels; the task's own")
    parser.add_argument(
        '--budget', type=amount, default='2%', help="parameters of the adapters, or '2%%' of all"
    )
    parser.add_argument('--methods', nargs='+', choices=METHODS, default=list(METHODS))
    parser.add_argument('--main', action='store_true', help=f'only {", ".join(MAIN)}')
    parser.add_argument('--seeds', type=int, default=5)
    parser.add_argument(
        '--at',
        type=setting,
        nargs='+',
        default=[],
        metavar='KEY=VALUE',
        help="final runs of tuned methods with another 'rate', 'scale' or 'epochs'",
    )
    parser.add_argument('--workers', type=int, default=1, help='processes of one thread')
    parser.add_argument('--slurm', metavar='PARTITION', help='submit the workers to Slurm')
    parser.add_argument('--hours', type=int, default=24, help='longest time of a Slurm job')
    parser.add_argument('--records', type=Path, default=None, help='one JSON line a trial')
    parser.add_argument('--count', type=int, default=3, help='trials that are run again')
    parser.add_argument('--draw', type=int, default=0, help='seed that chooses them')
    args = parser.parse_args(arguments)
    args.at = dict(args.at)
    known = list(TASKS[args.task].backbones)
    args.backbone = args.backbone or known[0]
    if args.backbone not in known:
        known = ', '.join(known)
        parser.error(f'--task {args.task} runs with --backbone {known}, not {args.backbone}.')
    if args.main:
        args.methods = list(MAIN)
    name = f'{args.task}_{args.backbone}'
    args.records = args.records or FOLDER / 'records' / f'{name}.jsonl'
    args.claims = Path('work_dirs/transfer_study') / name
    backbone = BACKBONES[args.backbone]
    side = TASKS[args.task].size
    args.size = args.size or math.ceil(side / backbone.patch) * backbone.patch
    if args.size % backbone.patch:
        parser.error(f'the sides of images for {args.backbone} are multiples of {backbone.patch}')
    if isinstance(args.budget, float):
        args.budget = int(float(f'{args.budget * backbone.parameters():.2g}'))
    args.base = Trial(
        task=args.task,
        backbone=args.backbone,
        size=args.size,
        method='frozen',
        budget=args.budget,
        rate=0.0,
        scale=1.0,
        ridge=0.0,
        epochs=0,
        stage='tune',
        seed=0,
    )
    return args


def main() -> None:
    args = parse()
    warnings.filterwarnings('ignore', '.*more parameters than the weight')
    if args.at:
        known = read_records(args.records)
        for method in args.methods:
            if not tuned(args.base, method, args.seeds, known):
                raise SystemExit(f'{method} is not tuned yet: run it without --at first.')
    if args.command in ('run', 'status'):
        args.methods = fitting(args.base, args.methods)
    if args.command == 'run':
        submit(args) if args.slurm else run(args)
        return
    if args.command == 'again':
        again(args)
        return
    records = read_records(args.records)
    if args.command == 'status':
        for trial in left(args, records):
            print(describe(trial))
        hours = sum(record['seconds'] for record in records.values()) / 3600
        print(f'{len(records)} trials in {hours:.1f} core-hours')
    else:
        print(report.tables(args.base, args.methods, args.seeds, records))


if __name__ == '__main__':
    main()
