"""Train all methods on the demo's task at one budget, with several seeds, and compare them.

    python tools/analysis_tools/sweep.py [--methods lora flora] [--budget 280k] [--seeds 0 1 2]

All runs start from one detector, the demo's heads on its frozen backbone, and
take the same steps from there. Methods that a rank governs get the largest
one within the budget, the others have the size that they have. With several
learning rates each method first runs once with each, from a seed that counts
no further, and keeps the best.

Runs that have ended are kept, unless config, data, base or detector change (a
changed implementation is not noticed: delete their folders). So an
interrupted sweep goes on, and one with more methods or seeds adds to it.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import sys
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from mmengine.config import Config

import mmpeft
from mmpeft.engine.config import compose, read_config
from mmpeft.engine.launch import check_checkpoint, run
from mmpeft.methods import Ranked

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'demo'))

# isort: off
from experiment import CONFIGS, TASKS, TOOLS, Experiment, config_of  # noqa: E402
from experiment import fingerprint, make_data_and_base, methods, reached  # noqa: E402
from jobs import Job, results, run_jobs  # noqa: E402
from demo_report import SCORES  # noqa: E402
from sweep_report import score, show, summary_of, write  # noqa: E402
# isort: on

TUNING_SEED = 1000


def main():
    args = parse_args()
    for method in args.methods:
        compose(config_of(args.task), method)  # refuses unknown names
    start = args.start or detector(args.task)
    check_checkpoint(start)
    setting = Setting(args.task, args.steps, args.batch_size, args.head_lr, args.budget, str(start))
    folder = Path(args.out) / args.task
    rates = {method: args.lrs[0] for method in args.methods}
    if len(args.lrs) > 1:
        tried = [Run(m, TUNING_SEED, lr, setting, folder) for m in rates for lr in args.lrs]
        carry_out(tried, args.at_once, 'learning rates')
        rates |= best_rates(tried)
    runs = [Run(m, seed, lr, setting, folder) for seed in args.seeds for m, lr in rates.items()]
    carry_out(runs, args.at_once, 'seeds')
    rows = [summary_of([r for r in runs if r.method == method]) for method in args.methods]
    rows.sort(key=lambda row: -row.get('mean', 0))
    show(rows, setting)
    write(rows, runs, folder)


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--methods', nargs='+', default=methods(), metavar='METHOD')
    parser.add_argument('--task', default='coco', help=', '.join(TASKS))
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2], metavar='SEED')
    parser.add_argument('--steps', type=int, default=200)
    parser.add_argument('--batch-size', type=int, default=4)
    parser.add_argument('--budget', default='280k', help='adapter parameters at the most')
    parser.add_argument(
        '--lrs',
        nargs='+',
        type=float,
        default=[1e-3],
        metavar='LR',
        help='learning rates of what trains in the backbone',
    )
    parser.add_argument('--head-lr', type=float, default=1e-3, help='of neck and heads')
    parser.add_argument('--start', help="a detector's plain checkpoint, in place of the demo's")
    parser.add_argument('--at-once', type=int, default=os.cpu_count(), help='runs side by side')
    parser.add_argument('--out', default='work_dirs/sweep', help='folder for everything')
    return parser.parse_args()


def detector(task):
    """The demo's detector on a frozen backbone, trained now if it is not there.

    Returns:
        Path: Its merged checkpoint, which is a plain one.
    """
    make_data_and_base(task)
    experiment = Experiment('frozen', task, seed=0)
    experiment.prepare()
    if not experiment.is_trained():
        run_jobs([experiment.training()])
    if not experiment.merged.exists():
        run_jobs([experiment.merging()])
    return experiment.merged


CONFIG = """\
_base_ = ['mmpeft::demo/_base_/{task}.py', 'mmpeft::_base_/methods/{method}.py']
load_from = {start!r}
train_dataloader = dict(batch_size={batch_size})
train_cfg = dict(max_iters={steps}, val_interval={steps})
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end={warmup}),
    dict(type='CosineAnnealingLR', by_epoch=False, begin={warmup}, end={steps}, eta_min=1e-5),
]
optim_wrapper = dict(
    optimizer=dict(lr={head_lr}),
    paramwise_cfg=dict(
        # Of two keys that fit the longer one holds: the fresh norms follow the heads.
        custom_keys={{'backbone.norm': dict(), 'backbone': dict(lr_mult={lr} / {head_lr})}},
        bypass_duplicate=True,  # factors that adapters hold in common
    ),
)
default_hooks = dict(
    peft=dict(_base_.peft, method=dict(_base_.peft.method{budget})),
    checkpoint=dict(interval={steps} + 1, save_last=False),
)
randomness = dict(seed={seed})
"""


@dataclass(frozen=True)
class Setting:
    """What all runs have in common.

    Attributes:
        task: Of the demo.
        steps: Of each run.
        batch_size: Images of a step.
        head_lr: Learning rate of neck and heads.
        budget: For methods with a rank.
        start: Checkpoint of the detector.
    """

    task: str
    steps: int
    batch_size: int
    head_lr: float
    budget: str
    start: str

    def config(self, method, seed, lr):
        """The text of a run's config."""
        budget = f', budget={self.budget!r}' if issubclass(method_of(method), Ranked) else ''
        common = asdict(self) | dict(budget=budget, warmup=max(self.steps // 10, 1))
        return CONFIG.format(method=method, seed=seed, lr=lr, **common)


def method_of(name):
    """The class of the method that a config below ``_base_/methods`` names."""
    hook = Config.fromfile(CONFIGS / '_base_' / 'methods' / f'{name}.py').peft
    return mmpeft.METHODS.get(hook.method.type)


@dataclass
class Run:
    """One training; all its files lie in ``folder``.

    Attributes:
        method: Of the configs below ``_base_/methods``.
        seed: Of adapters and batches.
        lr: Learning rate of what trains in the backbone.
        setting: Common to all.
        parent: Folder of the sweep.
    """

    method: str
    seed: int
    lr: float
    setting: Setting
    parent: Path

    @property
    def folder(self):
        return self.parent / f'{self.method}_lr{self.lr:g}_seed{self.seed}'

    @property
    def record(self):
        return self.folder / 'result.json'

    @cached_property
    def config(self):
        """The config as a file, for tools/train.py."""
        path = self.parent / 'configs' / f'{self.folder.name}.py'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.setting.config(self.method, self.seed, self.lr))
        return path

    @cached_property
    def key(self):
        cfg = read_config(self.config)
        return fingerprint(str(cfg.to_dict()), cfg.model.backbone.checkpoint, cfg.load_from)

    @cached_property
    def result(self):
        """What :meth:`conclude` noted; empty if that was for another config, data or base."""
        known = json.loads(self.record.read_text()) if self.record.exists() else {}
        return known if known and known['key'] == self.key else {}

    @property
    def is_done(self):
        return bool(self.result) and 'failure' not in self.result

    def training(self):
        """The job that trains and evaluates."""
        shutil.rmtree(self.folder, ignore_errors=True)
        command = [TOOLS / 'train.py', self.config, '--work-dir', self.folder]
        log = self.folder / 'train.log'
        steps = self.setting.steps
        return Job(self.folder.name, command, log, steps, lambda: reached(self.folder))

    def conclude(self, job, code):
        """Note how the training ended."""
        self.result = dict(key=self.key, method=self.method, seed=self.seed, lr=self.lr)
        scalars = [
            json.loads(line)
            for path in self.folder.glob('*/vis_data/scalars.json')
            for line in path.read_text().splitlines()
        ]
        scores = {name: line[name] for line in scalars for name in SCORES if name in line}
        if code or not scores:
            last = job.output_end().strip().splitlines() or ['no output']
            self.result |= dict(failure=f'status {code}: {last[-1]}')
        else:
            step = statistics.median(line['time'] for line in scalars if 'loss' in line)
            self.result |= dict(scores=scores, seconds=job.seconds, seconds_per_step=step)
        self.record.write_text(json.dumps(self.result, indent=2))


def carry_out(runs, at_once, purpose):
    """Train what is not there yet; a run that fails does not stop the others."""
    missing = {each.folder.name: each for each in runs if not each.is_done}
    print(f'{purpose}: {len(runs) - len(missing)} of {len(runs)} runs are there already')
    for job, code in results([each.training() for each in missing.values()], at_once):
        missing[job.name].conclude(job, code)


def best_rates(tried):
    """The learning rate with the best score, for each method with any."""
    done = [each for each in tried if each.is_done]
    return {each.method: each.lr for each in sorted(done, key=score)}


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(main)
    except KeyboardInterrupt:
        sys.exit('\nInterrupted. The same command goes on from here.')
