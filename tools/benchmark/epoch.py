"""How long an epoch of the demo takes with an adapter, frozen, and with everything trained.

    python tools/benchmark/epoch.py [--methods frozen flora full] [--task coco]

Whole Runners of the demo's configs, with data, heads, hooks and optimizer. All
of them live in one process and take an iteration in turn, so that each is
compared with what ran within seconds of it. Needs OpenMMLab and the demo's data
and base, which are made if they are not there.
"""

import argparse
import sys
import tempfile
import threading
import time
from pathlib import Path

import records
import torch
from grids import Grid, write_document
from mmengine.hooks import Hook
from rounds import spread
from terminal import show

from mmpeft.engine.config import read_config
from mmpeft.engine.launch import build_runner, run
from mmpeft.engine.packages import import_task

sys.path.append(str(Path(__file__).resolve().parents[1] / 'demo'))
import experiment  # noqa: E402

TOOL = 'epoch'


class Turns:
    """Lets several threads go on one after the other, in a fixed order.

    Args:
        names: In that order.
    """

    def __init__(self, names):
        self.waiting = list(names)
        self.changed = threading.Condition()

    def wait(self, name: str) -> None:
        """Until it is a thread's turn."""
        with self.changed:
            self.changed.wait_for(lambda: self.waiting[0] == name)

    def give(self, name: str) -> None:
        """End a thread's turn."""
        with self.changed:
            self.waiting.append(self.waiting.pop(0))
            self.changed.notify_all()

    def leave(self, name: str) -> None:
        """Take a thread out, whose turns are over."""
        with self.changed:
            self.waiting.remove(name)
            self.changed.notify_all()


class TakeTurns(Hook):
    """Ends a Runner's turn after each iteration, and notes how long it took."""

    priority = 'LOWEST'

    def __init__(self, turns: Turns, name: str):
        self.turns, self.name = turns, name
        self.seconds = []

    def before_train(self, runner):
        self._begin()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.seconds.append(time.perf_counter() - self.begun)
        self.turns.give(self.name)
        self._begin()

    def _begin(self):
        self.turns.wait(self.name)
        self.begun = time.perf_counter()


def main():
    args = parse_args()
    torch.set_num_threads(args.threads)
    experiment.make_data_and_base(args.task)
    there = records.environment('cpu')
    seconds = measure(args)
    asked = dict(methods=args.methods, task=args.task, threads=args.threads, device='cpu')
    data = dict(tool=TOOL, environment=there, arguments=asked, seconds=seconds)
    data['described'] = records.described(data)
    records.Record(args.out, data).save()
    grid = grid_of(seconds, args)
    show(data['described'], grid, args.out)
    if args.markdown:
        write_document(args.markdown, TOOL, f'{data["described"]}\n\n{grid.markdown()}')


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--methods', nargs='+', default=['frozen', 'flora', 'full'])
    parser.add_argument('--task', default='coco', choices=experiment.TASKS)
    parser.add_argument('--steps', type=int, help='instead of an epoch')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--out', type=Path, default=Path('work_dirs/benchmark/epoch.json'))
    parser.add_argument('--markdown', type=Path, help='write the table between its marks')
    return parser.parse_args()


def measure(args) -> dict[str, list[float]]:
    """Seconds of each iteration of each method."""
    turns, hooks, threads, failed = Turns(args.methods), {}, [], []
    with tempfile.TemporaryDirectory() as folder:
        for method in args.methods:
            runner = runner_of(method, args, Path(folder))
            hooks[method] = TakeTurns(turns, method)
            runner.register_hook(hooks[method])
            work = threading.Thread(target=train, args=(runner, turns, method, failed))
            threads.append(work)
        for work in threads:
            work.start()
        for work in threads:
            work.join()
    if failed:
        raise failed[0]
    return {method: hook.seconds for method, hook in hooks.items()}


def train(runner, turns, name, failed):
    """One Runner's training, in a thread."""
    try:
        runner.train()
    except BaseException as error:  # told by the main thread
        failed.append(error)
    finally:
        turns.leave(name)


def runner_of(method, args, folder):
    """A Runner of the demo that trains for an epoch, and writes nothing that is kept."""
    cfg = read_config(experiment.compose(method, args.task, folder))
    cfg.work_dir = str(folder / method)
    cfg.experiment_name = f'{TOOL}_{method}'
    import_task(cfg)
    cfg.default_hooks.checkpoint = None
    cfg.default_hooks.logger.interval = 10**9
    cfg.update(val_cfg=None, val_dataloader=None, val_evaluator=None)
    cfg.update(test_cfg=None, test_dataloader=None, test_evaluator=None)
    cfg.train_cfg.val_interval = 10**9
    cfg.train_cfg.max_iters = args.steps or epoch_of(cfg)
    return build_runner(cfg)


def epoch_of(cfg):
    """How many batches the training set makes."""
    from mmengine.registry import DATASETS, init_default_scope

    init_default_scope(cfg.default_scope)
    return len(DATASETS.build(cfg.train_dataloader.dataset)) // cfg.train_dataloader.batch_size


def grid_of(seconds, args) -> Grid:
    """Iterations and epochs of all methods, over the first."""
    first, base = next(iter(seconds.items()))
    steps = min(map(len, seconds.values()))
    columns = ('backbone', 'ms an iteration', 'epoch, s', f'over {first}')
    grid = Grid(f'{args.task}, {steps} iterations', columns)
    for method, found in seconds.items():
        ratio = spread([a / b for a, b in zip(found, base, strict=False)])
        grid.rows.append(
            (
                method,
                f'{spread(found)["median"] * 1e3:.1f}',
                f'{sum(found):.1f}',
                f'{ratio["median"]:.2f} ±{(ratio["high"] - ratio["low"]) / 2:.2f}',
            )
        )
    return grid


if __name__ == '__main__':
    run(main)
