"""Write the methods' table and sections into README.md and docs/methods.md.

    python docs/methods_page.py [--check]

They come from the files of configs/_base_/methods and the methods' cards. Sizes are counted on
ConvNeXt-V2-B, built without memory.
"""

import argparse
import copy
import re
import warnings
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch
from mmengine.config import Config

from mmpeft.injection.inject import inject
from mmpeft.methods import Method
from mmpeft.methods.base import FAMILIES
from mmpeft.models import TimmBackbone
from mmpeft.registry import METHODS

ROOT = Path(__file__).resolve().parents[1]
PAGE = 'docs/methods.md'
BEGIN = '<!-- written by docs/methods_page.py from here -->'
END = '<!-- to here -->'


@dataclass
class Entry:
    """A file of ``configs/_base_/methods``.

    Attributes:
        name: What ``--method`` takes.
        title: What the method is, from the comment in the first line.
        source: Its paper, from the same line, or None.
        config: The method, as ``METHODS.build`` takes it.
        targets: Where it is applied.
    """

    name: str
    title: str
    source: str | None
    config: dict
    targets: dict

    @cached_property
    def method(self) -> Method:
        return METHODS.build(self.config)

    @property
    def formula(self) -> str:
        """phi(W) with the update that the file chooses."""
        formula = self.method.card.formula
        if getattr(self.method, 'update', None) == 'lie':
            formula = re.sub(r'W \+ (.+)', r'W ⊙ (1 + \1)', formula)
        if self.method.card.family == 'activations':
            return formula
        return f"{'b' if formula.startswith('b ') else 'W'}' = {formula}"

    def trained(self) -> tuple[int, float]:
        """Parameters that train in the backbone at rank 16, and their share of its own."""
        config = self.config | (dict(rank=16) if 'rank' in self.config else {})
        with torch.device('meta'), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # adapters larger than their weights
            summary = inject(copy.deepcopy(backbone()), config, self.targets, empty=True)
        trained = summary.unfrozen if self.method.trains_base else summary.adapters
        return trained, trained / summary.base

    def row(self) -> tuple[str, ...]:
        count, share = self.trained()
        merges = 'yes' if self.method.merges else 'no'
        return f'[`{self.name}`](#{self.name})', self.title, f'{count:,}', f'{share:.2%}', merges

    def section(self) -> str:
        text = f'#### {self.name}\n\n    {self.formula}\n\n- Suited to: {self.method.card.suits}'
        if not self.source:
            return text
        link = r'[arXiv:\1](https://arxiv.org/abs/\1)'
        return f'{text}\n- Source: ' + re.sub(r'arXiv:([\d.]+)', link, self.source) + '.'


@cache
def backbone() -> TimmBackbone:
    with torch.device('meta'):
        return TimmBackbone('convnextv2_base')


def entries(folder: Path) -> dict[str, list[Entry]]:
    """The method files of a folder, by family and in the order of their names."""
    found = {family: [] for family in FAMILIES}
    for path in sorted(folder.glob('*.py')):
        comment = re.match(r'# (.+?)(?: \((arXiv.*)\))?\.\n', path.read_text())
        if not comment:
            raise SystemExit(
                f'{path} must begin with a line such as '
                '# LoRA: the product of two thin matrices (arXiv:2106.09685).'
            )
        peft = Config.fromfile(path).peft.to_dict()
        targets = peft.get('targets', {}) | dict(module='')
        entry = Entry(path.stem, *comment.groups(), peft['method'], targets)
        found[entry.method.card.family].append(entry)
    return {family: members for family, members in found.items() if members}


def table(names, rows) -> str:
    return '\n'.join(f'| {" | ".join(cells)} |' for cells in (names, ['---'] * len(names), *rows))


def overview(found: dict[str, list[Entry]]) -> str:
    """A table with a row for each family."""
    rows = (
        (
            f'[{family}]({PAGE}#{family})',
            FAMILIES[family],
            ', '.join(f'`{e.name}`' for e in members),
        )
        for family, members in found.items()
    )
    return table(('family', 'what its methods do', '`--method`'), rows)


def page(found: dict[str, list[Entry]]) -> str:
    """A section for each family, with a table and a section for each method."""
    columns = '`--method`', 'what it is', 'parameters', 'share', 'merges'
    parts = []
    for family, members in found.items():
        meaning = FAMILIES[family]
        parts += [f'### {family.capitalize()}', f'{meaning[0].upper()}{meaning[1:]}.']
        parts.append(table(columns, (entry.row() for entry in members)))
        parts += [entry.section() for entry in members]
    return '\n\n'.join(parts)


def marked(path: str, text: str) -> str:
    """A document with ``text`` between its marks."""
    before, begin, rest = (ROOT / path).read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f'{path} has lost its marks. Put {BEGIN!r} and {END!r} back into it.')
    return f'{before}{BEGIN}\n\n{text}\n\n{END}{after}'


def documents() -> dict[str, str]:
    """What each document should hold, by its path."""
    found = entries(ROOT / 'configs/_base_/methods')
    return {'README.md': marked('README.md', overview(found)), PAGE: marked(PAGE, page(found))}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--check', action='store_true', help='fail if one is out of date')
    check = parser.parse_args().check
    stale = {path: text for path, text in documents().items() if (ROOT / path).read_text() != text}
    if check and stale:
        raise SystemExit(f'Out of date: {", ".join(stale)}. Run python docs/methods_page.py.')
    for path, text in stale.items():
        (ROOT / path).write_text(text)
        print(f'Wrote {path}')


if __name__ == '__main__':
    main()
