"""From a command line to a Runner.

What is wrong with a config, its data or its packages is reported here as one
paragraph, before a Runner exists and a work directory is made.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from mmpeft.errors import MissingFileError, UsageError

from .amp import prepare_precision
from .config import compose, find_hook, run_name
from .data_check import check_data
from .hooks.fitting import FittingHook
from .loading import read_source, unplaced
from .loops import build_loops
from .packages import import_task
from .processes import prepare_distribution
from .unexpected import naming_arguments
from .work_dir import make_work_dir


def load_config(args: argparse.Namespace, splits: Sequence[str] = ()) -> Config:
    """Compose a tool's config and import the package of its task.

    The work directory is that of the arguments, or ``work_dirs/`` and method
    and config; a ``work_dir`` of the config holds for the config's own method.

    Args:
        args: ``config`` and what :func:`~mmpeft.engine.command_line.add_arguments` adds.
        splits: Of ``'train'``, ``'val'``, ``'test'``, whose data must be there.

    Raises:
        UsageError: The config, data or a package is missing, or method and
            options do not fit.
    """
    if args.launcher != 'none':
        os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = compose(args.config, args.method, args.cfg_options)
    cfg.launcher = args.launcher
    own = None if args.method else cfg.get('work_dir')
    cfg.work_dir = args.work_dir or own or f'work_dirs/{run_name(args.config, args.method)}'
    check_data(cfg, splits)
    import_task(cfg)
    return cfg


def check_checkpoint(path: str | Path, cfg: Config | None = None) -> None:
    """Refuse a checkpoint that does not exist, or that a config cannot load.

    Args:
        path: Addresses are not checked.
        cfg: Refuses adapters if it has no PEFTHook: mmengine would skip them.

    Raises:
        UsageError: There is no such file, or the config has no place for what
            is in it.
    """
    if '://' in str(path):
        return
    if not Path(path).exists():
        raise MissingFileError(
            f'there is no checkpoint {str(path)!r} in {Path.cwd()}. Give a file that training '
            'saved, such as work_dirs/<config>/epoch_12.pth.'
        )
    manifest = read_source(path).manifest if cfg and find_hook(cfg) is None else None
    if manifest is not None:
        raise UsageError(unplaced(manifest, str(path), cfg.filename))


def enable_auto_scale_lr(cfg: Config) -> None:
    """Scale the learning rate by the batch size.

    Raises:
        UsageError: The config does not say for which batch size it is.
    """
    if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
        raise UsageError(
            f'--auto-scale-lr: {cfg.filename} does not say for how many images a step its learning '
            'rate is. Add auto_scale_lr=dict(enable=False, base_batch_size=16) with their number.'
        )
    cfg.auto_scale_lr.enable = True


def enable_shard(cfg: Config) -> None:
    """Spread the frozen base over the processes.

    Raises:
        UsageError: The config adapts nothing.
    """
    hook = find_hook(cfg)
    if hook is None:
        raise UsageError(
            f'--shard: {cfg.filename} has no PEFTHook, which shards the model. Add --method, which '
            'is full for a model that trains whole.'
        )
    hook.shard = True


def build_runner(cfg: Config, splits: Sequence[str] = ()) -> Runner:
    """The Runner of a config, in as many processes as the launcher started.

    Args:
        cfg: Of :func:`load_config`.
        splits: Of ``'train'``, ``'val'``, ``'test'``, whose datasets are built here.

    Raises:
        UsageError: The work directory cannot be written to, a part has no such argument, or
            a dataset cannot be built.
    """
    make_work_dir(cfg)
    prepare_distribution(cfg)
    prepare_precision(cfg)
    with naming_arguments(cfg):
        runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
        if find_hook(cfg) is None:
            runner.register_hook(FittingHook())
        build_loops(runner, splits)
    return runner
