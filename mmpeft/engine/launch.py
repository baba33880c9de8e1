"""From a command line to a Runner: what the tools share.

What is wrong with a config, its data or its packages is reported here as one
paragraph, before a Runner exists and a work directory is made.
"""

import argparse
import atexit
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryFile

import torch.distributed
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import is_distributed
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from rich.console import Console
from rich.table import Table

from mmpeft.errors import MissingFileError, TrainingError, UnwrittenFileError, UsageError

from .config import compose, dicts_in, find_hook, run_name, say, type_name
from .data_check import describe, missing_data
from .hooks.fitting import FittingHook
from .key_values import KeyValues
from .loading import read_source, unplaced
from .loops import build_loops
from .packages import import_task
from .unexpected import naming_arguments


def run(main: Callable[[], None]) -> None:
    """Call a tool's ``main``; errors of :mod:`mmpeft.errors` end it with a paragraph alone."""
    try:
        main()
    except (UsageError, TrainingError, UnwrittenFileError) as error:
        sys.exit(f'{Path(sys.argv[0]).name}: {error}')


def parser_of(tool: str) -> argparse.ArgumentParser:
    """A parser whose help begins with a tool's docstring."""
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=tool, formatter_class=formatter)


def show(*tables: Table, width: int = 120) -> None:
    """Print tables, in a file or pipe with lines of a given width."""
    console = Console(width=None if sys.stdout.isatty() else width)
    for table in tables:
        console.print(table)


def add_config_arguments(parser: argparse.ArgumentParser, **config) -> None:
    """Add ``config``, and what changes it: ``--method`` and ``--cfg-options``."""
    parser.add_argument(
        'config',
        help='config file, or package::path such as mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco',
        **config,
    )
    parser.add_argument(
        '--method',
        help="a method in place of the config's: a file of configs/_base_/methods, or a dict such "
        'as "dict(type=\'LoRA\', rank=4)"; an upstream config gets the hook with it',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=KeyValues,
        help='overrides of the config as key=value, e.g. default_hooks.peft.method.rank=16; '
        'lists as key="[a,b]" or key=a,b, nested ones as key="[(a,b),(c,d)]", without spaces',
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that all tools with a Runner have in common."""
    add_config_arguments(parser)
    parser.add_argument('--work-dir', help='where logs and checkpoints go')
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='what started the processes',
    )
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)


def load_config(args: argparse.Namespace, splits: Sequence[str] = ()) -> Config:
    """Compose a tool's config and import the package of its task.

    The work directory is that of the arguments, or ``work_dirs/`` and method
    and config; a ``work_dir`` of the config holds for the config's own method.

    Args:
        args: ``config`` and what :func:`add_arguments` adds.
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
    missing = missing_data(cfg, splits)
    if missing:
        raise MissingFileError(describe(missing))
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


def check_work_dir(cfg: Config) -> None:
    """Refuse to train over the checkpoints of a run with another method.

    Raises:
        UsageError: The work directory has them.
    """
    folder = Path(cfg.work_dir)
    file = folder / Path(cfg.filename or '').name  # where a Runner writes its config
    if cfg.get('resume') or not (folder / 'last_checkpoint').exists() or not file.is_file():
        return
    if _adapts(Config.fromfile(file)) != _adapts(cfg):
        raise UsageError(
            f'{folder} has the checkpoints of a run with another method or other targets '
            f'({file.name}). Give another folder by --work-dir, or remove this one.'
        )


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


def enable_amp(cfg: Config) -> None:
    """Train in mixed precision.

    Raises:
        UsageError: The optimizer wrapper is neither ``OptimWrapper`` nor
            ``AmpOptimWrapper``.
    """
    kind = cfg.optim_wrapper.get('type', 'OptimWrapper')
    if kind not in ('OptimWrapper', 'AmpOptimWrapper'):
        raise UsageError(
            f'--amp: optim_wrapper.type={kind!r} has no mixed-precision form. Set it to '
            "'AmpOptimWrapper' in the config, or leave --amp out."
        )
    cfg.optim_wrapper.type = 'AmpOptimWrapper'
    cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')


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


def prepare_precision(cfg: Config) -> None:
    """Let ``AmpOptimWrapper`` work on a machine without an accelerator, in bfloat16.

    Raises:
        UsageError: The config asks for another precision there.
    """
    wrapper = cfg.get('optim_wrapper') or {}
    if wrapper.get('type') != 'AmpOptimWrapper' or get_device() != 'cpu':
        return
    dtype = str(wrapper.get('dtype') or 'bfloat16').removeprefix('torch.')
    if dtype != 'bfloat16':
        raise UsageError(
            f'Mixed precision in {dtype} needs an accelerator, and torch sees none here. Set '
            "optim_wrapper.dtype='bfloat16', which CPUs have, or optim_wrapper.type='OptimWrapper'."
        )
    for key in ('dtype', 'loss_scale', 'use_fsdp'):
        wrapper.pop(key, None)
    wrapper.type = 'mmpeft.CPUAmpOptimWrapper'
    say('Mixed precision is in bfloat16, without scaling the loss: torch sees no accelerator.')


def prepare_distribution(cfg: Config) -> None:
    """Let ``--launcher pytorch`` work on a machine without an accelerator.

    mmengine's own start selects a CUDA device whatever the backend. Without
    one, the process group starts here, with gloo, DDP gets no device, and
    SyncBN, which has no CPU form, becomes BN.

    Raises:
        UsageError: Another launcher is used on such a machine.
    """
    launcher = cfg.get('launcher', 'none')
    if launcher == 'none' or get_device() != 'cpu':
        return
    if launcher != 'pytorch':
        raise UsageError(
            f'--launcher {launcher} needs an accelerator, and torch sees none here. '
            'On CPUs write: tools/dist_train.sh CONFIG PROCESSES'
        )
    if not is_distributed():
        torch.distributed.init_process_group('gloo')
        atexit.register(_leave_group)
    wrapper = dict(
        type='MMDistributedDataParallel',
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )
    own = cfg.get('model_wrapper_cfg') or {}
    if own.get('type', wrapper['type']) == wrapper['type']:
        cfg.model_wrapper_cfg = wrapper | own | dict(device_ids=None)
    for node in dicts_in(cfg.model):
        if type_name(node).rpartition('.')[2] in ('SyncBN', 'SyncBatchNorm'):
            node['type'] = 'BN'


def _leave_group():
    # A gloo thread releases its tensors a moment after the other ranks have the result. If the
    # interpreter has ended by then, the process aborts.
    time.sleep(0.3)
    if is_distributed():
        torch.distributed.destroy_process_group()


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
