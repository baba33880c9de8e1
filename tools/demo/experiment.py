"""One of the demo's runs: its files, and the jobs that make them."""

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from jobs import Job

from mmpeft.engine.config import read_config
from mmpeft.errors import UsageError, near
from mmpeft.registry import METHODS

TOOLS = Path(__file__).resolve().parents[1]
CONFIGS = TOOLS.parent / 'configs'
DATA, WORK = Path('data/digits'), Path('work_dirs/demo')

# Each task with the network whose base it adapts.
TASKS = dict(ade20k='convnext', coco='convnext', dota='convnext', internvit='internvit')
BASES = dict(convnext=WORK / 'base.pth', internvit=WORK / 'base_internvit.pth')
CONFIG = """\
_base_ = ['mmpeft::demo/_base_/{task}.py', 'mmpeft::_base_/methods/{method}.py']
default_hooks = dict(peft={hook})
"""
# InternViT has no fresh norms that the methods' configs could unfreeze.
HOOKS = dict(
    convnext='_base_.peft',
    internvit="dict(_base_.peft, targets=dict(module='backbone'), unfreeze=())",
)


def methods():
    """Names of the configs below ``_base_/methods``."""
    return sorted(path.stem for path in (CONFIGS / '_base_' / 'methods').glob('*.py'))


def check_names(method, task):
    """Raise UsageError unless there are such a method and task."""
    for kind, name, known in (('method', method, methods()), ('task', task, TASKS)):
        if name not in known:
            raise UsageError(f'there is no {kind} {name!r}. {near(name, known)}')


def compose(method, task, folder):
    """Write the config of a method on one of the demo's tasks, for all tools to read.

    Args:
        method (str): Of :func:`methods`.
        task (str): Of ``TASKS``.
        folder (Path): Takes it. The Runner writes the whole config under the
            same name into its work directory, so this must be another one.

    Returns:
        Path: ``folder/<method>_<task>.py``.

    Raises:
        UsageError: There is no such method or task.
    """
    check_names(method, task)
    path = folder / f'{method}_{task}.py'
    folder.mkdir(parents=True, exist_ok=True)
    hook = HOOKS[TASKS[task]]
    path.write_text(CONFIG.format(method=method, task=task, hook=hook))
    return path


def fingerprint(text, *files):
    """Equal where a config's text, the data and the files that it stands on are the same."""
    digest = hashlib.sha256(text.encode())
    for path in (DATA / 'made_with.json', *files):
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()


def make_data_and_base(task):
    """Compose the scenes and train the base of a task, unless they are there."""
    call('dataset_converters/digits.py', '--out', DATA)
    network = TASKS[task]
    arguments = ('--network', network, '--data', DATA / 'source', '--out', BASES[network])
    call('demo/base.py', *arguments)


def call(tool, *arguments):
    """Run a tool to its end.

    Raises:
        SystemExit: It failed.
    """
    command = [sys.executable, TOOLS / tool, *arguments]
    code = subprocess.run([str(part) for part in command]).returncode
    if code:
        raise SystemExit(code)


def reached(folder):
    """The step that the training in a folder has reached, and its loss."""
    files = sorted(folder.glob('*/vis_data/scalars.json'))
    lines = files[-1].read_text().splitlines() if files else []
    for line in reversed(lines):
        scalars = json.loads(line) if line.endswith('}') else {}
        if 'loss' in scalars:
            return scalars['step'], f'loss {scalars["loss"]:.2f}'
    return 0, ''


class Experiment:
    """A method on a task, trained from a seed; all its files lie in ``folder``.

    Args:
        method (str): As in :func:`compose`.
        task (str): Likewise.
        seed (int): Of heads, adapters and batches.

    Attributes:
        merges: Whether the adapters can be folded into the weights.
    """

    def __init__(self, method, task, seed):
        self.method = method
        self.seed = seed
        self.config = compose(method, task, WORK / 'configs')
        self.cfg = read_config(self.config)
        self.merges = METHODS.build(self.cfg.default_hooks.peft.method).merges
        self.steps = self.cfg.train_cfg.max_iters
        self.folder = WORK / f'{method}_{task}_seed{seed}'
        self.checkpoint = self.folder / f'iter_{self.steps}.pth'
        self.merged = self.folder / 'merged.pth'

    def prepare(self):
        """Start anew where config, data or base are no longer what they were."""
        record = self.folder / 'made_from.txt'
        made_from = fingerprint(self.cfg.pretty_text, self.cfg.model.backbone.checkpoint)
        if self.folder.exists() and not (record.exists() and record.read_text() == made_from):
            print(f'{self.folder} was made from another config, data or base: starting anew.')
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        record.write_text(made_from)

    def is_trained(self):
        """Whether the last checkpoint was written to its end."""
        last = self.folder / 'last_checkpoint'
        return last.exists() and Path(last.read_text()).name == self.checkpoint.name

    def training(self):
        """The job that trains, or goes on from the latest checkpoint."""
        command = [TOOLS / 'train.py', self.config, '--work-dir', self.folder]
        if (self.folder / 'last_checkpoint').exists():
            command.append('--resume')
        command += ['--cfg-options', f'randomness.seed={self.seed}']
        log = self.folder / 'train.log'
        return Job(
            f'train {self.folder.name}', command, log, self.steps, lambda: reached(self.folder)
        )

    def merging(self):
        """The job that folds the adapters into the backbone."""
        files = [self.config, self.checkpoint, self.merged]
        command = [TOOLS / 'merge.py', *files, '--overwrite']
        return Job(f'merge {self.folder.name}', command, self.folder / 'merge.log')

    def evaluation(self):
        """Of the checkpoint, with predictions drawn."""
        return Evaluation(self.config, self.checkpoint, self.folder / 'test', self.folder.name)

    def evaluation_of_merged(self):
        """Of the merged checkpoint, by the config that knows of no adapters."""
        name = f'{self.folder.name} merged'
        return Evaluation(
            self.merged.with_suffix('.py'),
            self.merged,
            self.folder / 'test_merged',
            name,
            draw=False,
        )


@dataclass
class Evaluation:
    """A checkpoint's scores on the validation set, and pictures.

    Attributes:
        config: Of the model.
        checkpoint: Of the model.
        folder: Takes what the evaluation writes.
        name: For the bar.
        draw: Whether to draw predictions too.
    """

    config: Path
    checkpoint: Path
    folder: Path
    name: str
    draw: bool = True

    def job(self):
        shutil.rmtree(self.folder, ignore_errors=True)
        command = [TOOLS / 'test.py', self.config, self.checkpoint, '--work-dir', self.folder]
        if self.draw:
            command += ['--show-dir', (self.folder / 'pictures').resolve()]
        return Job(f'test {self.name}', command, self.folder / 'test.log')

    def is_done(self):
        return bool(self.scores())

    def scores(self):
        """Names and values, empty before the evaluation has ended."""
        for path in sorted(self.folder.glob('*/*.json')):
            return json.loads(path.read_text())
        return {}

    def pictures(self):
        """Drawn predictions, in the order of the validation set."""
        return sorted((self.folder / 'pictures').glob('**/*.[pj][np]g'))
