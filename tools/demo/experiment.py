"""One of the demo's runs: its files, and the jobs that make them."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from jobs import Job

from mmpeft.launch import read_config

TOOLS = Path(__file__).resolve().parents[1]
CONFIGS = TOOLS.parent / 'configs' / 'demo'
DATA, WORK = Path('data/digits'), Path('work_dirs/demo')


class Experiment:
    """A method on a task, trained from a seed; all its files lie in ``folder``.

    Args:
        method (str): As in the names of ``configs/demo/<method>_<task>.py``.
        task (str): Likewise.
        seed (int): Of heads, adapters and batches.
    """

    def __init__(self, method, task, seed):
        self.method = method
        self.seed = seed
        self.config = CONFIGS / f'{method}_{task}.py'
        self.cfg = read_config(self.config)
        self.steps = self.cfg.train_cfg.max_iters
        self.folder = WORK / f'{method}_{task}_seed{seed}'
        self.checkpoint = self.folder / f'iter_{self.steps}.pth'
        self.merged = self.folder / 'merged.pth'

    def prepare(self):
        """Start anew where config, data or base are no longer what they were."""
        digest = hashlib.sha256(self.cfg.pretty_text.encode())
        for path in (DATA / 'made_with.json', WORK / 'base.pth'):
            digest.update(path.read_bytes())
        record, made_from = self.folder / 'made_from.txt', digest.hexdigest()
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
        return Job(f'train {self.folder.name}', command, log, self.steps, self._reached)

    def _reached(self):
        """The step that training has reached, and its loss."""
        files = sorted(self.folder.glob('*/vis_data/scalars.json'))
        lines = files[-1].read_text().splitlines() if files else []
        for line in reversed(lines):
            scalars = json.loads(line) if line.endswith('}') else {}
            if 'loss' in scalars:
                return scalars['step'], f'loss {scalars["loss"]:.2f}'
        return 0, ''

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
