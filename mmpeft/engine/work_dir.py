"""The folder of a run: that it can be written to, and holds no run with another method."""

import ast
import json
from pathlib import Path
from tempfile import TemporaryFile

from mmengine.config import Config

from mmpeft.errors import UsageError, listed

from .config import find_hook


def check_work_dir(cfg: Config) -> None:
    """Refuse to train over the checkpoints of a run with another method.

    Raises:
        UsageError: The work directory has them.
    """
    folder = Path(cfg.work_dir)
    configs = sorted(filter(_is_written, folder.glob('*.py')))
    if cfg.get('resume') or not configs or not (folder / 'last_checkpoint').exists():
        return
    if all(_adapts(Config.fromfile(config)) != _adapts(cfg) for config in configs):
        raise UsageError(
            f'{folder} has the checkpoints of a run with another method or other targets '
            f'({listed([config.name for config in configs])}). Give another folder by --work-dir, '
            'or remove this one.'
        )


def _is_written(file):
    """Whether a file may be a Runner's config, which assigns values and does nothing else."""
    try:
        lines = ast.parse(file.read_bytes()).body
    except (SyntaxError, ValueError):
        return False
    return all(isinstance(line, ast.Assign) for line in lines)


def _adapts(cfg):
    hook = find_hook(cfg) or {}
    parts = {key: hook.get(key) for key in ('method', 'targets', 'unfreeze')}
    return json.dumps(parts, sort_keys=True, default=str)


def make_work_dir(cfg: Config) -> None:
    """Create the work directory of a config, if it does not exist.

    Raises:
        UsageError: It cannot be created or written to.
    """
    try:
        Path(cfg.work_dir).mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=cfg.work_dir).close()
    except OSError as error:
        is_file = isinstance(error, (FileExistsError, NotADirectoryError))
        raise UsageError(
            f'The work directory {cfg.work_dir!r} '
            + ('is a file, or below one' if is_file else f'cannot be written to: {error.strerror}')
            + '. Give another folder by --work-dir (work_dir of the config).'
        ) from error
