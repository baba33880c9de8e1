"""What the scripts share: configs, data and models from the command line."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import datasets
import transformers
from mmengine.config import Config

from mmpeft.engine.key_values import KeyValues, check_options
from mmpeft.errors import MissingFileError, TrainingError, UsageError

from .data import GLUE, Texts, read_texts
from .tasks import TASKS, find_task
from .trial import ARGUMENTS

# What options may add to a config, by its keys.
NAMES = {
    '': ('data', 'sentences', 'label', 'model', 'rows', 'tuning'),
    r'training|tasks\.\w+|(tuning|methods\.\w+)\.training': ARGUMENTS,
    'tasks': (*TASKS, 'own'),
    'tuning': ('rows', 'held_out', 'seeds', 'kept', 'training'),
    r'methods\.\w+': ('method', 'arguments', 'targets', 'training', 'rates'),
    r'methods\.\w+\.(method|arguments|targets)': None,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of data and model; what is not given is the config's."""
    parser.add_argument('config', type=Path, help='of configs/')
    parser.add_argument('--data', help='folder, or name on the Hugging Face hub')
    parser.add_argument('--model', help='likewise')
    parser.add_argument('--sentences', nargs='+', help='columns of a data set of your own')
    parser.add_argument('--label', help='column of its labels')
    parser.add_argument(
        '--cfg-options', nargs='+', action=KeyValues, help='such as training.bf16=True'
    )


def read_config(args: argparse.Namespace) -> dict:
    """The config with the arguments put in.

    Raises:
        MissingFileError: There is no such file.
        UsageError: An option has no effect.
    """
    if not args.config.is_file():
        raise MissingFileError(f'There is no config {str(args.config)!r}.')
    config = Config.fromfile(args.config)
    options = args.cfg_options or {}
    check_options(options, config.to_dict(), NAMES)
    for key in options:
        above, _, name = key.rpartition('.')
        if above == 'training' and any(name in task for task in config.tasks.values()):
            raise UsageError(
                f'--cfg-options: {key} has no effect, since each task has its own {name}. Write '
                f'tasks.rte.{name}, or tasks.own.{name} for a data set of your own.'
            )
    config.merge_from_dict(options)
    config = dict(data=GLUE, sentences=('sentence',), label='label') | config.to_dict()
    given = {k: getattr(args, k) for k in ('data', 'model', 'sentences', 'label')}
    return config | {key: value for key, value in given.items() if value is not None}


def texts_of(config: dict, task: str) -> Texts:
    """The data of a task of GLUE, or the config's own for any other name.

    Raises:
        UsageError: See :func:`read_texts`.
    """
    if config['data'] == GLUE:
        find_task(task)
    name = task if task in TASKS else None
    return read_texts(name, config['data'], config['sentences'], config['label'])


def task_of(config: dict, name: str | None) -> str:
    """The task to be run: the name given, or the folder's of a data set of one's own.

    Raises:
        UsageError: There is neither.
    """
    if name is None and config['data'] == GLUE:
        raise UsageError(f'Name a task of GLUE with --task: {", ".join(TASKS)}.')
    return name or Path(config['data']).name


def tasks_of(config: dict, names: Sequence[str] | None) -> list[str]:
    """The tasks to be run: those given, or else all of GLUE, or the one data set of one's own."""
    if names or config['data'] != GLUE:
        return list(names or [task_of(config, None)])
    return list(TASKS)


def run(main) -> None:
    """Run a script's ``main``; an error that the user can mend is one paragraph."""
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        main()
    except (UsageError, TrainingError) as error:
        raise SystemExit(str(error)) from None
