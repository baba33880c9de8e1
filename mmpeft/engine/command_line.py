"""What the command lines of the tools share."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mmpeft.errors import TrainingError, UnwrittenFileError, UsageError

from .key_values import KeyValues


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
