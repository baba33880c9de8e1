"""One of the demo's runs: its files, and the jobs that make them."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

from jobs import Job

from mmpeft.engine.config import compose, find_hook
from mmpeft.engine.method_argument import method_name, methods_in
from mmpeft.errors import UsageError, suggest
from mmpeft.registry import METHODS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TOOLS, CONFIGS = ROOT / 'tools', ROOT / 'configs'
WORK = Path('work_dirs/demo')
# Each task with the network whose base it adapts, by the images that it is made of.
TASKS = dict(
    digits=dict(
        ade20k='convnext',
        classification='convnext',
        coco='convnext',
        dota='convnext',
        internvit='internvit',
    ),
    photos=dict(ade20k='efficientnet', coco='efficientnet', dota='efficientnet'),
)
# What is compared with the frozen backbone; on photos flora's own scale does harm (docs/demo.md).
DEFAULTS = dict(digits='flora', photos="dict(type='FLoRA', rank=8, kernel_rank=2, scale=1.0)")
FOLDERS = {data: Path('data') / data for data in TASKS}
BASES = dict(
    convnext=WORK / 'base.pth',
    internvit=WORK / 'base_internvit.pth',
    efficientnet=WORK / 'efficientnet_lite0.pth',
)


def methods() -> list[str]:
    """Names that ``--method`` takes."""
    return sorted(path.stem for path in (CONFIGS / '_base_/methods').glob('*.py'))


def config_of(task: str, data: str = 'digits') -> str:
    """The config of a task, without a method.

    Raises:
        UsageError: There is no such task, or no such data.
    """
    for name, known in (data, TASKS), (task, TASKS.get(data, ())):
        if name not in known:
            what = 'data' if known is TASKS else f'task of {data}'
            raise UsageError(f'There is no {what} {name!r}. {suggest(name, known)}')
    folder = '' if data == 'digits' else f'{data}/'
    return f'mmpeft::demo/_base_/{folder}{task}.py'


def make_data_and_base(task: str, data: str = 'digits', arguments: tuple[str, ...] = ()) -> None:
    """Compose the scenes and make the base of a task, unless they exist.

    Args:
        arguments: Further ones of ``digits.py`` or ``photos.py``.

    Raises:
        SystemExit: One of the tools failed.
    """
    network = TASKS[data][task]
    base = ['--out', BASES[network]]
    if data == 'digits':
        base += ['--network', network, '--data', FOLDERS[data] / 'source']
    maker = 'base.py' if data == 'digits' else 'pretrained.py'
    for script, words in (
        (f'{data}.py', ['--out', FOLDERS[data], *arguments]),
        (maker, base),
    ):
        command = [sys.executable, HERE / script, *words]
        code = subprocess.run([str(part) for part in command]).returncode
        if code:
            raise SystemExit(code)


def reached(folder: Path) -> tuple[int, str]:
    """The step that the training in a folder has reached, and its loss."""
    files = sorted(folder.glob('*/vis_data/scalars.json'))
    lines = files[-1].read_text().splitlines() if files else []
    for line in reversed(lines):
        scalars = json.loads(line) if line.endswith('}') else {}
        if 'loss' in scalars:
            return scalars['step'], f'loss {scalars["loss"]:.2f}'
    return 0, ''


class Experiment:
    """A method on a task, trained from a seed.

    Args:
        method: Of :func:`methods`, or a dict as text.
        task: Of ``TASKS[data]``.
        seed: Of heads, adapters and batches.
        data: ``'digits'`` or ``'photos'``.

    Attributes:
        cfg: The composed config.
        title: The method's type, for pictures.
        merges: Whether the adapters can be folded into the weights.
        folder: Holds all files.
        config: The composed config as a file, once the training has begun.

    Raises:
        UsageError: There is no such method, data or task.
    """

    def __init__(self, method: str, task: str, seed: int, data: str = 'digits'):
        self.method, self.task, self.seed = method, task, seed
        self.data = FOLDERS.get(data)
        self.source = config_of(task, data)
        self.cfg = compose(self.source, method)
        parts = list(methods_in(find_hook(self.cfg)))
        self.title = ' + '.join(part['type'] for part in parts)
        self.merges = all(METHODS.build(part).merges for part in parts)
        self.steps = self.cfg.train_cfg.max_iters
        name = task if data == 'digits' else f'{data}_{task}'
        self.folder = WORK / f'{method_name(method)}_{name}_seed{seed}'
        self.config = self.folder / f'{task}.py'
        self.checkpoint = self.folder / f'iter_{self.steps}.pth'
        self.merged = self.folder / 'merged.pth'

    def prepare(self) -> None:
        """Start anew where config, data or base are no longer what they were."""
        record = self.folder / 'made_from.txt'
        digest = hashlib.sha256(self.cfg.pretty_text.encode())
        for path in (self.data / 'made_with.json', self.cfg.model.backbone.checkpoint):
            digest.update(Path(path).read_bytes())
        made_from = digest.hexdigest()
        if self.folder.exists() and not (record.exists() and record.read_text() == made_from):
            print(f'{self.folder} was made from another config, data or base: starting anew.')
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        record.write_text(made_from)

    def is_trained(self) -> bool:
        """Whether the last checkpoint was written to its end."""
        last = self.folder / 'last_checkpoint'
        return last.exists() and Path(last.read_text()).name == self.checkpoint.name

    def training(self) -> Job:
        """The job that trains, or goes on from the latest checkpoint."""
        command = [TOOLS / 'train.py', self.source, '--method', self.method]
        command += ['--work-dir', self.folder]
        if (self.folder / 'last_checkpoint').exists():
            command.append('--resume')
        command += ['--cfg-options', f'randomness.seed={self.seed}']
        return self._job('train', command, self.steps, lambda: reached(self.folder))

    def merging(self) -> Job:
        """The job that folds the adapters into the backbone."""
        files = [self.config, self.checkpoint, self.merged]
        return self._job('merge', [TOOLS / 'merge.py', *files, '--overwrite'])

    def testing(self, merged: bool = False) -> Job:
        """The job that evaluates.

        Args:
            merged: The merged checkpoint, by its own config without adapters,
                instead of the trained one.
        """
        folder = self._tests(merged)
        shutil.rmtree(folder, ignore_errors=True)
        files = [self.config, self.checkpoint]
        if merged:
            files = [self.merged.with_suffix('.py'), self.merged]
        command = [TOOLS / 'test.py', *files, '--work-dir', folder]
        return self._job(folder.name, command)

    def scores(self, merged: bool = False) -> dict[str, float]:
        """What the evaluation found; empty before it has ended."""
        for path in sorted(self._tests(merged).glob('*/*.json')):
            return json.loads(path.read_text())
        return {}

    def _tests(self, merged):
        return self.folder / ('test_merged' if merged else 'test')

    def _job(self, name, command, *progress):
        log = self.folder / f'{name}.log'
        return Job(f'{name} {self.folder.name}', command, log, *progress)
