"""Tables of the figures of updates; a figure that is NaN is ``null``, nothing or ``-`` there."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isnan
from pathlib import Path

from rich.table import Column, Table

from .parameters import write_table
from .updates import UpdateFigures, means


def update_table(
    rows: Sequence[UpdateFigures], cosines: Mapping[str, float] | None = None, title: str = ''
) -> Table:
    """One line a weight, and their means.

    Args:
        rows: Of one model.
        cosines: To the updates of another, of :func:`~mmpeft.analysis.updates.cosines`.
        title: Of the table.
    """
    (first, *others), last = _lines(rows, cosines), dict(name='mean', **means(rows))
    last |= dict(cosine=cosines['all']) if cosines else {}
    table = Table(Column('weight', overflow='fold'), title=title)
    for name in list(first)[1:]:
        table.add_column(name.replace('_', ' '), justify='left' if name == 'kind' else 'right')
    for line in (first, *others):
        table.add_row(*map(_cell, line.values()))
    table.add_section()
    table.add_row(*(_cell(last.get(name, '')) for name in first))
    return table


def write_updates(
    path: Path, rows: Sequence[UpdateFigures], cosines: Mapping[str, float] | None = None
) -> None:
    """Write one line a weight into a file of :data:`~mmpeft.analysis.parameters.FORMATS`."""
    lines = _lines(rows, cosines)
    values = [list(line.values()) for line in lines]
    write_table(path, list(lines[0]), values, [map(_cell, line) for line in values], lines)


def _lines(rows, cosines):
    lines = [asdict(row) | dict(shape='x'.join(map(str, row.shape))) for row in rows]
    if cosines is not None:
        lines = [line | dict(cosine=cosines.get(line['name'])) for line in lines]
    return [{name: None if _is_nan(v) else v for name, v in line.items()} for line in lines]


def _is_nan(value):
    return isinstance(value, float) and isnan(value)


def _cell(value):
    if value is None or _is_nan(value):
        return '-'
    return f'{value:.4g}' if isinstance(value, float) else str(value)
