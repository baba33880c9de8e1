"""Tables for the terminal and for documents, from the same cells."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

from mmpeft.errors import UsageError


@dataclass
class Grid:
    """A table of texts.

    Attributes:
        title: Above it.
        columns: Heads; all but the first are set to the right.
        rows: Cells.
        notes: Lines below it.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def rich(self) -> Table:
        """For the terminal."""
        caption = '\n'.join(self.notes) or None
        table = Table(title=self.title, caption=caption, title_justify='left')
        table.caption_justify = 'left'
        for number, column in enumerate(self.columns):
            table.add_column(
                column, justify='right' if number else 'left', overflow='fold', no_wrap=not number
            )
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """For a document."""
        lines = [f'**{self.title}**', '']
        lines += [_line(self.columns), _line(['---'] + ['---:'] * (len(self.columns) - 1))]
        lines += [_line(row) for row in self.rows]
        return '\n'.join(lines + [f'\n{note}' for note in self.notes])


def _line(cells):
    return f'| {" | ".join(cell.replace("|", "/") for cell in cells)} |'


def ratio(value: dict | None, with_spread: bool = False) -> str:
    """A median, and on request half the distance of the quartiles."""
    if value is None:
        return ''
    text = f'{value["median"]:.2f}'
    return f'{text} ±{(value["high"] - value["low"]) / 2:.2f}' if with_spread else text


def milliseconds(value: dict | None) -> str:
    """A median of seconds."""
    return f'{value["median"] * 1e3:,.1f}' if value else ''


def mebibytes(size: int | None) -> str:
    """Bytes in MiB."""
    return '' if size is None else f'{size / 2**20:,.1f}'


def write_document(path: Path, tool: str, text: str) -> None:
    """Put text between the marks of a tool, or into a file that is not there yet.

    Raises:
        UsageError: The file has no marks of the tool.
    """
    begin, end = f'<!-- written by tools/benchmark/{tool}.py from here -->', '<!-- to here -->'
    part = f'{begin}\n\n{text}\n\n{end}'
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(part + '\n')
        return
    whole = path.read_text()
    marked = re.compile(f'{re.escape(begin)}.*?{re.escape(end)}', re.DOTALL)
    if not marked.search(whole):
        raise UsageError(
            f'--markdown: {str(path)!r} has no place for the tables. Put the lines {begin!r} and '
            f'{end!r} where they shall stand, or name a file that does not exist.'
        )
    path.write_text(marked.sub(lambda _: part, whole, count=1))
