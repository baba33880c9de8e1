"""What is said while the benchmark runs, and at its end."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from grids import Grid
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

LOG_WIDTH = 140


def show(*contents) -> None:
    """Print texts and grids."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=LOG_WIDTH)
    for content in contents:
        if isinstance(content, Grid):
            console.print(content.rich())
        else:
            console.print(str(content), highlight=False, soft_wrap=True)


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[str, int], None]]:
    """A bar on a terminal, a line in a log.

    Yields:
        A function of what is done now and the number of steps made.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        print(f'{title}: {total} steps', file=sys.stderr, flush=True)
    columns = TextColumn('{task.description}'), BarColumn(), TimeElapsedColumn()
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(title, total=total)

        def advance(text, steps):
            bar.update(task, advance=steps, description=f'{title}: {text}', refresh=True)

        yield advance
