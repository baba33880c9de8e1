"""Tables of adapted weights and of what they cost in parameters, and accuracy against that."""

import csv
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.table import Column, Table

from mmpeft.errors import UsageError
from mmpeft.injection.summary import Summary

COLUMNS = ('rank', 'name', 'kind', 'method', 'shape', 'weight', 'adapter', 'share')
FORMATS = ('.csv', '.json', '.md')

Summaries = Mapping[int | None, Summary]
"""Summaries of one model by the rank in place of its method's; None for the method's own."""


def layer_table(summary: Summary, title: str) -> Table:
    """One line a weight; weights with fewer parameters than their adapter stand out."""
    table = Table(Column('weight', overflow='fold'), 'kind', 'shape', title=title)
    for column in ('parameters', 'adapter', 'share'):
        table.add_column(column, justify='right')
    for row in summary.rows:
        _, name, kind, _, shape, weight, adapter, share = _cells(None, row)
        name = name.removeprefix(f'{summary.module}.')
        style = 'yellow' if row.adapter > row.weight else None
        table.add_row(name, kind, shape, weight, adapter, share, style=style)
    return table


def kind_table(summaries: Summaries) -> Table:
    """Adapter parameters by kind of layer, and totals: one column a rank."""
    table = Table('', title='adapter parameters')
    kinds = defaultdict(lambda: dict.fromkeys(summaries, 0))
    for rank, summary in summaries.items():
        table.add_column('' if rank is None else f'rank {rank}', justify='right')
        for row in summary.rows:
            kinds[row.kind][rank] += row.adapter
    for kind, counts in kinds.items():
        table.add_row(kind, *(f'{count:,}' for count in counts.values()))
    table.add_section()
    for name in ('adapters', 'unfrozen', 'base', 'outside'):
        table.add_row(name, *(f'{getattr(s, name):,}' for s in summaries.values()))
    table.add_row('share', *(f'{s.share:.2%}' for s in summaries.values()))
    return table


def ppt(accuracy: float, parameters: float) -> float:
    """V-PETL Bench's performance-efficiency trade-off, ``M exp(-log10(P / 10 M + 1))``.

    Args:
        accuracy: In percent; M is its fraction.
        parameters: P, what trains in the backbone.
    """
    return accuracy / 100 * math.exp(-math.log10(parameters / 1e7 + 1))


def check_format(path: Path) -> None:
    """Raise UsageError unless the format is one of :data:`FORMATS`."""
    if path.suffix not in FORMATS:
        raise UsageError(f'{path}: the name must end in {", ".join(FORMATS)}.')


def write(path: Path, summaries: Summaries) -> None:
    """Write all rows, and in ``.json`` and ``.md`` the totals, into a file of :data:`FORMATS`."""
    pairs = [(rank, row) for rank, summary in summaries.items() for row in summary.rows]
    cells = [_cells(rank, row) for rank, row in pairs]
    numbers = [(row.weight, row.adapter, row.adapter / row.weight) for _, row in pairs]
    rows = [[*own[:5], *values] for own, values in zip(cells, numbers, strict=True)]
    content = [dict(rank=rank) | summary.to_dict() for rank, summary in summaries.items()]
    write_table(path, COLUMNS, rows, cells, content)
    if path.suffix == '.md':
        totals = ', '.join(f'{s.adapters:,}' for s in summaries.values())
        with path.open('a') as file:
            file.write(f'\nadapter parameters: {totals}\n')


def write_table(
    path: Path, header: Sequence[str], rows: Iterable, cells: Iterable, content: list
) -> None:
    """Write ``rows`` as .csv, their ``cells`` of text as .md, or ``content`` as .json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == '.json':
        path.write_text(json.dumps(content, indent=2))
    elif path.suffix == '.csv':
        with path.open('w', newline='') as file:
            csv.writer(file, lineterminator='\n').writerows([header, *rows])
    else:
        lines = [header, ['---'] * len(header), *cells]
        path.write_text(''.join(f'| {" | ".join(line)} |\n' for line in lines))


def _cells(rank, row):
    return [
        '' if rank is None else str(rank),
        row.name,
        row.kind,
        row.method,
        'x'.join(map(str, row.shape)),
        f'{row.weight:,}',
        f'{row.adapter:,}',
        f'{row.adapter / row.weight:.1%}',
    ]
