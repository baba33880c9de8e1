"""The methods as documents describe them: one entry a file of ``configs/_base_/methods``.

All of it is read from those files and from the methods' cards. The sizes are counted on
ConvNeXt-V2-B, built without memory.
"""

import copy
import re
import warnings
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch
from mmengine.config import Config

from mmpeft.errors import UsageError
from mmpeft.injection.inject import inject
from mmpeft.methods import Method
from mmpeft.methods.base import FAMILIES, Card
from mmpeft.models import TimmBackbone
from mmpeft.registry import METHODS

BACKBONE = 'convnextv2_base'
PAGE = 'docs/methods.md'
MEANINGS = dict(
    ends='what all methods lie between: nothing in the backbone trains, or everything',
    reconstruction='`f(W)`: scale the directions that a weight has, or change some of its entries',
    extension='`g(W)`: add an update of few numbers to a weight, or multiply the weight by it',
    combination='`g(f(W))`: both',
    activations='change activations instead of weights; these cannot be merged',
)
"""What the methods of each family do."""


@dataclass
class Entry:
    """A file of ``configs/_base_/methods`` and what is known of its method.

    Attributes:
        name: The file's name, which ``--method`` takes.
        title: The comment in its first line, without the source and the full stop.
        config: Its method, as ``METHODS.build`` takes it.
        targets: Its targets.
    """

    name: str
    title: str
    config: dict
    targets: dict

    @cached_property
    def method(self) -> Method:
        """The method, built."""
        return METHODS.build(self.config)

    @property
    def card(self) -> Card:
        """The method's card."""
        return self.method.card

    @property
    def formula(self) -> str:
        """phi(W) with the update that the file chooses."""
        formula = self.card.formula
        if getattr(self.method, 'update', None) == 'lie':
            formula = re.sub(r'W \+ (.+)', r'W ⊙ (1 + \1)', formula)
        if self.card.family == 'activations':
            return formula
        return f"{'b' if formula.startswith('b ') else 'W'}' = {formula}"

    def trained(self, **changes) -> tuple[int, float]:
        """Count what trains in ConvNeXt-V2-B.

        Args:
            **changes: Arguments in place of those that the file gives; others are ignored.

        Returns:
            The number of parameters, and their share of the backbone's.
        """
        config = self.config | {k: v for k, v in changes.items() if k in self.config}
        with torch.device('meta'), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # adapters larger than their weights
            summary = inject(copy.deepcopy(_backbone()), config, self.targets, empty=True)
        trained = summary.unfrozen if self.method.trains_base else summary.adapters
        return trained, trained / summary.base


@cache
def _backbone() -> TimmBackbone:
    with torch.device('meta'):
        return TimmBackbone(BACKBONE)


def entries(folder: Path) -> list[Entry]:
    """Read the method files of a folder, in the order of families and names.

    Raises:
        UsageError: A file does not begin with a comment that says what the method is.
    """
    found = []
    for path in folder.glob('*.py'):
        comment = re.match(r'# (.+?)(?: \(arXiv.*\))?\.\n', path.read_text())
        if not comment:
            raise UsageError(
                f'{path} does not begin with a comment that says what the method is. Write a '
                'first line such as "# BitFit: the biases alone (arXiv:2106.10199)."'
            )
        peft = Config.fromfile(path).peft.to_dict()
        targets = peft.get('targets', {}) | dict(module='')
        found.append(Entry(path.stem, comment[1], peft['method'], targets))
    return sorted(found, key=lambda entry: (FAMILIES.index(entry.card.family), entry.name))


def overview(found: list[Entry]) -> str:
    """A Markdown table with one row a family."""
    rows = [
        (
            f'[{family}]({PAGE}#{family})',
            MEANINGS[family],
            ', '.join(f'`{entry.name}`' for entry in members),
        )
        for family, members in _by_family(found).items()
    ]
    return _table(('family', 'what its methods do', '`--method`'), rows)


def page(found: list[Entry]) -> str:
    """A Markdown section for each family, with one for each method below it."""
    parts = []
    for family, members in _by_family(found).items():
        meaning = MEANINGS[family]
        parts += [f'### {family.capitalize()}', f'{meaning[0].upper()}{meaning[1:]}.']
        rows = []
        for entry in members:
            count, share = entry.trained(rank=16)
            merges = 'yes' if entry.method.merges else 'no'
            link = f'[`{entry.name}`](#{entry.name})'
            rows.append((link, entry.title, f'{count:,}', f'{share:.2%}', merges))
        parts.append(_table(('`--method`', 'what it is', 'parameters', 'share', 'merges'), rows))
        parts += [_section(entry) for entry in members]
    return '\n\n'.join(parts)


def _section(entry: Entry) -> str:
    card = entry.card
    return '\n'.join(
        (
            f'#### {entry.name}\n',
            f'    {entry.formula}\n',
            f'- Trains: {card.trains}.',
            f'- Suited to: {card.suits}',
            f'- Costs: {card.cost}',
            f'- Source: {_linked(card.paper)}.',
        )
    )


def _by_family(found: list[Entry]) -> dict[str, list[Entry]]:
    members = {family: [e for e in found if e.card.family == family] for family in FAMILIES}
    return {family: entries for family, entries in members.items() if entries}


def _table(names, rows) -> str:
    return '\n'.join(f'| {" | ".join(cells)} |' for cells in (names, ['---'] * len(names), *rows))


def _linked(source: str) -> str:
    return re.sub(r'arXiv:(\d{4}\.\d{5})', r'[arXiv:\1](https://arxiv.org/abs/\1)', source)
