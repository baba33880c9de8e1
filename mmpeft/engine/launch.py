"""From a command line to a Runner: what the tools share.

Everything that can be known to be wrong is said here, before a Runner exists
and a work directory is made, as one paragraph.
"""

import argparse
import atexit
import os
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch.distributed
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.dist import is_distributed
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from mmpeft.errors import MissingFileError, TrainingError, UnwrittenFileError, UsageError, near

from .data_check import describe, missing_data

EXTRAS = dict(mmdet='det', mmseg='seg', mmrotate='rotate')
"""The tasks' packages, and which extra of mmpeft installs each."""


def run(main):
    """Call a tool's ``main``; errors of :mod:`mmpeft.errors` end it with a paragraph alone."""
    try:
        main()
    except (UsageError, TrainingError, UnwrittenFileError) as error:
        sys.exit(f'{Path(sys.argv[0]).name}: {error}')


def add_arguments(parser: argparse.ArgumentParser):
    """Add the arguments that OpenMMLab's training and testing tools have in common."""
    parser.add_argument('--work-dir', help='where logs and checkpoints go')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='overrides of the config as key=value, e.g. default_hooks.peft.method.rank=16; '
        'lists as key="[a,b]" or key=a,b, nested ones as key="[(a,b),(c,d)]", without spaces',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='what started the processes',
    )
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)


def load_config(args, splits=()) -> Config:
    """Read a tool's config and import the package of its task.

    Args:
        args (argparse.Namespace): ``config`` and what :func:`add_arguments` adds.
        splits (Sequence[str]): Of ``'train'``, ``'val'``, ``'test'``: those
            whose data must be there.

    Returns:
        Config: With ``--cfg-options``, ``launcher`` and ``work_dir`` set.

    Raises:
        UsageError: The file, data or a package that it needs is missing.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = read_config(args.config, args.cfg_options)
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or default_work_dir(args.config)
    missing = missing_data(cfg, splits)
    if missing:
        raise MissingFileError(describe(missing))
    import_task(cfg)
    return cfg


def default_work_dir(path) -> str:
    """Where a config's runs go: ./work_dirs and its path below ``configs``.

    The folder is part of it because the methods' configs have equal names.
    """
    parts = Path(path).resolve().with_suffix('').parts
    depth = parts[-2::-1].index('configs') + 1 if 'configs' in parts[:-1] else 1
    return str(Path('work_dirs', *parts[-depth:]))


def read_config(path, options=None) -> Config:
    """Read a config file and merge ``options`` into it.

    Raises:
        UsageError: The file, or a package that it inherits from, is missing.
    """
    path = Path(path)
    if not path.is_file():
        known = sorted(map(str, Path('configs').glob('[!_]*/*.py')))
        raise MissingFileError(
            f'there is no config {str(path)!r} in {Path.cwd()}. {near(str(path), known)}'
        )
    try:
        cfg = Config.fromfile(path)
    except ModuleNotFoundError as error:
        package = (error.name or str(error)).split()[0].split('.')[0]
        if package not in EXTRAS:
            raise
        raise UsageError(_missing(path, package)) from error
    if options:
        cfg.merge_from_dict(options)
    return _without_own_scope(cfg)


def _without_own_scope(cfg):
    # `mmpeft::` marks what it brings as of scope mmpeft, under which mmengine warns about every
    # registry that mmpeft has none of. The names in these configs resolve under any scope.
    for node in _dicts(cfg._cfg_dict):
        if node.get('_scope_') == 'mmpeft':
            del node['_scope_']
    return cfg


def _dicts(node):
    if isinstance(node, dict):
        yield node
        node = node.values()
    elif not isinstance(node, (list, tuple)):
        return
    for value in node:
        yield from _dicts(value)


def import_task(cfg: Config):
    """Import and register the package that the config's ``default_scope`` names.

    Raises:
        UsageError: It is not installed, or cannot be imported.
    """
    scope = cfg.get('default_scope')
    if scope not in EXTRAS:
        return
    for package in ('mmdet', 'mmrotate') if scope == 'mmrotate' else (scope,):
        try:
            import_module(f'{package}.utils').register_all_modules(init_default_scope=False)
        except ImportError as error:
            if find_spec(package) is None:
                raise UsageError(_missing(cfg.filename, package)) from error
            raise UsageError(
                f'{cfg.filename} needs {package}, which is installed but does not import: {error}. '
                'Bring its dependencies to versions that fit each other; requirements/ lists a set '
                'that does.'
            ) from error


def _missing(path, package):
    return (
        f'{path} needs {package}, which is not installed. '
        f"Write: pip install 'mmpeft[{EXTRAS[package]}]'"
    )


def check_checkpoint(path):
    """Raise MissingFileError where a local checkpoint does not exist."""
    if '://' not in str(path) and not Path(path).is_file():
        raise MissingFileError(
            f'there is no checkpoint {str(path)!r} in {Path.cwd()}. Give a file that training '
            'saved, such as work_dirs/<config>/epoch_12.pth.'
        )


def enable_amp(cfg: Config):
    """Train in mixed precision.

    Raises:
        UsageError: There is no accelerator, or the config has an optimizer
            wrapper that is neither ``OptimWrapper`` nor ``AmpOptimWrapper``.
    """
    if get_device() == 'cpu':
        raise UsageError('--amp needs an accelerator, and torch sees none here. Leave --amp out.')
    kind = cfg.optim_wrapper.get('type', 'OptimWrapper')
    if kind not in ('OptimWrapper', 'AmpOptimWrapper'):
        raise UsageError(
            f'--amp: optim_wrapper.type={kind!r} has no mixed-precision form. Set it to '
            "'AmpOptimWrapper' in the config, or leave --amp out."
        )
    cfg.optim_wrapper.type = 'AmpOptimWrapper'
    cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')


def enable_auto_scale_lr(cfg: Config):
    """Scale the learning rate by the batch size.

    Raises:
        UsageError: The config does not say for which batch size it is.
    """
    if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
        raise UsageError(
            f'--auto-scale-lr: {cfg.filename} does not say for how many images a step its learning '
            'rate is. Add auto_scale_lr=dict(enable=False, base_batch_size=16) with their number.'
        )
    cfg.auto_scale_lr.enable = True


def prepare_distribution(cfg: Config):
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
    cfg.model_wrapper_cfg = wrapper | (cfg.get('model_wrapper_cfg') or {}) | dict(device_ids=None)
    for node in _dicts(cfg.model):
        if node.get('type') == 'SyncBN':
            node['type'] = 'BN'


def _leave_group():
    # A thread of gloo lets go of its tensors a moment after the others have the result. If the
    # interpreter has ended by then, the process aborts.
    time.sleep(0.3)
    if is_distributed():
        torch.distributed.destroy_process_group()


def build_runner(cfg: Config) -> Runner:
    """The Runner of a config, in as many processes as the launcher started."""
    prepare_distribution(cfg)
    return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
