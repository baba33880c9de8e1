"""Tables of predicted memory."""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Column, Table

from mmpeft.execution import MEMORY

from .memory import Memory
from .parameters import write_table

COLUMNS = (
    *('weights', 'gradients', 'optimizer'),
    *(f'{kind}, {memory}' for kind in ('saved', 'total') for memory in MEMORY),
)

Rows = Sequence[tuple[str, Memory]]
"""Predictions, each with the name of a run."""


def table(rows: Rows) -> Table:
    """A line for each prediction: in GiB, or in MiB if all of them are below one GiB."""
    unit = _unit(rows)
    result = Table(Column('run', overflow='fold'), *COLUMNS, title=unit)
    for line in _cells(rows, unit):
        result.add_row(*line)
    return result


def write(path: Path, rows: Rows) -> None:
    """Write a line for each prediction: bytes into .csv and .json, what is printed into .md."""
    unit = _unit(rows)
    header = [f'run ({unit})' if path.suffix == '.md' else 'run', *COLUMNS]
    values = [[name, *_bytes(memory)] for name, memory in rows]
    content = [dict(zip(header, line, strict=True)) for line in values]
    write_table(path, header, values, _cells(rows, unit), content)


def _bytes(memory):
    fixed = memory.weights, memory.gradients, memory.optimizer
    return *fixed, *memory.saved.values(), *memory.totals.values()


def _unit(rows):
    largest = max(max(memory.totals.values()) for _, memory in rows)
    return 'GiB' if largest >= 2**30 else 'MiB'


def _cells(rows, unit):
    size = 2**30 if unit == 'GiB' else 2**20
    return [[name, *(f'{value / size:.2f}' for value in _bytes(memory))] for name, memory in rows]
