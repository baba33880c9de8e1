"""Write into the documents what the code says about each method.

    python tools/analysis_tools/methods_page.py [--check]

That is the marked parts of README.md and docs/methods.md, and README.md and
metafile.yml of each method's configs; a method without a config for COCO gets
one. Files without the mark of this tool are written by hand and stay.
"""

import argparse
import re
import textwrap
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from mmengine.config import Config

import mmpeft
from mmpeft.engine.launch import run
from mmpeft.errors import UsageError
from mmpeft.methods import Method
from mmpeft.methods.base import FAMILIES
from mmpeft.models import TimmBackbone

ROOT = Path(__file__).resolve().parents[2]
README, PAGE = 'README.md', 'docs/methods.md'
BEGIN = '<!-- written by tools/analysis_tools/methods_page.py from here -->'
END = '<!-- to here -->'
MARK = 'written by tools/analysis_tools/methods_page.py'
BACKBONE = 'convnextv2_base'
RANK = 16

BRANCHES = dict(
    ends='what every method lies between: nothing trains in the backbone, or everything',
    reconstruction='`f(W)`: the directions that the weight has are scaled, or its entries changed',
    extension='`g(W)`: an update from few numbers is added to the weight, or multiplied with it',
    combination='`g(f(W))`: both',
    activations='on what passes through, not on a weight: cannot be merged, is deployed as it is',
)
LEAF = """\
_base_ = [
    '../_base_/models/mask-rcnn_convnextv2.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/adamw_12e.py',
    '../_base_/runtime_det.py',
    '../_base_/methods/{name}.py',
]
default_hooks = dict(peft=_base_.peft)
"""
RECIPES = dict(
    convnext_coco=('Mask R-CNN', 'COCO', '12 epochs, 32 images a step'),
    convnext_ade20k=('UperNet', 'ADE20K 640x640', '160k iterations, 16 a step'),
    convnext_dota=('Oriented R-CNN (le90)', 'DOTA', '12 epochs, 16 images a step'),
)
TASKS = dict(
    convnext_coco=('COCO', 'Instance Segmentation'),
    convnext_ade20k=('ADE20K', 'Semantic Segmentation'),
    convnext_dota=('DOTA', 'Oriented Object Detection'),
)


def parse_args():
    parser = argparse.ArgumentParser(description='Write the documents of the methods')
    parser.add_argument(
        '--check', action='store_true', help='write nothing; fail where a document is stale'
    )
    return parser.parse_args()


@dataclass
class Entry:
    """A method's config, and what is known of it.

    Attributes:
        name: Of the file in ``configs/_base_/methods``.
        title: The comment that it opens with, without source and full stop.
        source: The comment's arXiv number, and what else stands with it.
        peft: Its hook.
    """

    name: str
    title: str
    source: str
    peft: dict

    @property
    def label(self) -> str:
        """The method's name, as it is written in texts."""
        return self.title.partition(':')[0]

    @cached_property
    def method(self) -> Method:
        return mmpeft.METHODS.build(self.peft['method'])

    @property
    def card(self):
        return self.method.card

    @property
    def formula(self) -> str:
        """The card's, with the update that the config chooses."""
        if getattr(self.method, 'update', None) == 'lie':
            return re.sub(r'W \+ (.+)', r'W ⊙ (1 + \1)', self.card.formula)
        return self.card.formula

    def size(self, **arguments) -> str:
        """Parameters that train in the backbone, and their share of it.

        Args:
            **arguments: In place of those that the config has.
        """
        method = dict(self.peft['method'])
        method |= {name: value for name, value in arguments.items() if name in method}
        targets = self.peft['targets'] | dict(module='')
        with torch.device('meta'), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # adapters that outgrow their weights
            backbone = TimmBackbone(BACKBONE)
            summary = mmpeft.inject(backbone, method, targets, self.peft.get('unfreeze', ()), True)
        trained = summary.unfrozen if self.method.trains_base else summary.adapters
        return f'{trained:,} ({trained / summary.base:.2%})'


def entries():
    """All methods' configs, in the order of families and names.

    Raises:
        UsageError: A config does not open with a comment.
    """
    found = []
    for path in (ROOT / 'configs/_base_/methods').glob('*.py'):
        comment = re.match(r'# (.+?)(?: \((arXiv.*)\))?\.\n', path.read_text())
        if not comment:
            raise UsageError(
                f'{path} does not open with what the method is. Write a first line such as '
                '"# BitFit: the biases alone (arXiv:2106.10199)."'
            )
        peft = Config.fromfile(path).peft.to_dict()
        found.append(Entry(path.stem, comment[1], comment[2] or '', peft))
    return sorted(found, key=lambda e: (FAMILIES.index(e.card.family), e.name))


def by_family(found):
    """Families with their methods."""
    members = {family: [e for e in found if e.card.family == family] for family in FAMILIES}
    return {family: entries for family, entries in members.items() if entries}


def overview(found):
    """One row a family, for the front page."""
    rows = (
        (
            f'[{family}]({PAGE}#{family})',
            BRANCHES[family],
            ', '.join(f'`{e.name}`' for e in members),
        )
        for family, members in by_family(found).items()
    )
    return '\n'.join(table(('family', 'what it does', 'configs'), rows))


def page(found):
    """The methods of each family: what they are, and when to take them."""
    lines = []
    for family, members in by_family(found).items():
        branch = BRANCHES[family]
        lines += [f'### {family.capitalize()}', '', f'{branch[0].upper()}{branch[1:]}.', '']
        lines += table(
            ('config', 'method', "`W'`", 'trains', 'parameters', 'merges'),
            (
                (
                    f'[`{entry.name}`](../configs/{entry.name}/README.md)',
                    entry.title,
                    entry.formula,
                    entry.card.trains,
                    entry.size(rank=RANK),
                    'yes' if entry.method.merges else 'no',
                )
                for entry in members
            ),
        )
        cards = {}
        for entry in members:
            cards.setdefault(entry.card, []).append(f'`{entry.name}`')
        lines += table(
            ('config', 'suits', 'cost', 'source'),
            (
                (', '.join(names), card.suits, card.cost, linked(card.paper))
                for card, names in cards.items()
            ),
        )
    return '\n'.join(lines)


def table(names, rows):
    """Lines of a Markdown table, and an empty one."""
    cells = [names, ['---' for _ in names], *rows]
    return [f'| {" | ".join(row)} |' for row in cells] + ['']


def wrapped(text):
    """Lines of a paragraph or a list item."""
    indent = '  ' if text.startswith('- ') else ''
    return textwrap.wrap(
        text, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def linked(source):
    """A source with its arXiv numbers as links."""
    return re.sub(r'arXiv:(\d{4}\.\d{5})', r'[arXiv:\1](https://arxiv.org/abs/\1)', source)


def leaves(entry):
    """The runnable configs of a method, COCO's first."""
    folder = ROOT / 'configs' / entry.name
    return [s for s in RECIPES if s == 'convnext_coco' or (folder / f'{s}.py').exists()]


def readme(entry):
    """README.md of a method's configs."""
    name, card = entry.name, entry.card
    start = '' if card.family == 'activations' else "W' = "
    what = entry.title.partition(': ')[2]
    if entry.source not in card.paper:
        what += f' ({linked(entry.source)})'
    rows = ((f'[{stem}.py]({stem}.py)', *RECIPES[stem]) for stem in leaves(entry))
    lines = [
        f'<!-- {MARK} -->',
        f'# {entry.label}',
        '',
        f'    {start}{entry.formula}',
        '',
        *wrapped(f'{what[:1].upper()}{what[1:]}. Source: {linked(card.paper)}.'),
        '',
        *wrapped(f'- Trains: {card.trains}.'),
        *wrapped(f'- Suits: {card.suits}'),
        *wrapped(f'- Costs: {card.cost}'),
        *wrapped(f'- Merges: {"yes" if entry.method.merges else "no, it is deployed as it is"}.'),
        '',
        *table(('config', 'model', 'data', 'recipe'), rows),
        f'ConvNeXt-V2-B, AdamW at 1e-4, weight decay 0.05. Adapter parameters: {entry.size()}.',
        '',
        '```bash',
        f'tools/dist_train.sh configs/{name}/convnext_coco.py 8',
        f'tools/dist_test.sh configs/{name}/convnext_coco.py '
        f'work_dirs/{name}/convnext_coco/epoch_12.pth 8',
        f'python tools/analysis_tools/param_table.py configs/{name}/convnext_coco.py',
        '```',
    ]
    return '\n'.join(lines) + '\n'


def metafile(entry):
    """metafile.yml of a method's configs."""
    paper = re.match(r'(.+?)(?:, (?:Eq|Prop|Sec)\..*?)? \(arXiv:(\d{4}\.\d{5})\)', entry.card.paper)
    lines = [
        f'# {MARK}',
        'Collections:',
        f'  - Name: {entry.label}',
        '    Metadata:',
        '      Architecture:',
        '        - ConvNeXt-V2',
        '      Training Techniques:',
        '        - AdamW',
        '        - Weight Decay',
    ]
    if paper:
        lines += [
            '    Paper:',
            f'      URL: https://arxiv.org/abs/{paper[2]}',
            f'      Title: {paper[1]}',
        ]
    lines += [f'    README: configs/{entry.name}/README.md', '', 'Models:']
    for stem in leaves(entry):
        data, task = TASKS[stem]
        lines += [
            f'  - Name: {entry.name}_{stem}',
            f'    In Collection: {entry.label}',
            f'    Config: configs/{entry.name}/{stem}.py',
            '    Metadata:',
            f'      Training Data: {data}',
            f'      Task: {task}',
        ]
    return '\n'.join(lines) + '\n'


def documents():
    """What each document is to hold: path below the root to text."""
    found = entries()
    texts = {}
    for entry in found:
        for file, write in (('README.md', readme), ('metafile.yml', metafile)):
            path = f'configs/{entry.name}/{file}'
            if MARK in _read(path).partition('\n')[0] or not (ROOT / path).exists():
                texts[path] = write(entry)
        leaf = f'configs/{entry.name}/convnext_coco.py'
        texts[leaf] = _read(leaf) or LEAF.format(name=entry.name)
    return texts | {README: marked(README, overview(found)), PAGE: marked(PAGE, page(found))}


def marked(path, text):
    """A document with a text between its marks.

    Raises:
        UsageError: It has no marks.
    """
    before, begin, rest = _read(path).partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UsageError(f'{path} has lost its marks. Put {BEGIN!r} and {END!r} back into it.')
    return f'{before}{BEGIN}\n\n{text}\n{END}{after}'


def _read(path):
    return (ROOT / path).read_text() if (ROOT / path).exists() else ''


def main():
    args = parse_args()
    stale = {path: text for path, text in documents().items() if _read(path) != text}
    if args.check and stale:
        raise UsageError(
            f'{len(stale)} documents are stale: {", ".join(stale)}. '
            'Write them by: python tools/analysis_tools/methods_page.py'
        )
    for path, text in stale.items():
        (ROOT / path).parent.mkdir(exist_ok=True)
        (ROOT / path).write_text(text)
        print(f'written: {path}')


if __name__ == '__main__':
    run(main)
