"""Which way each adapted layer of a config's backbone is executed, and what it costs.

    python tools/analysis_tools/explain.py configs/flora/convnext_coco.py [--size 800 1344]

The forward pass runs on tensors without data. Costs are multiply-adds of
products and convolutions in forward and backward; passes over memory are not
counted.
"""

import argparse
import contextlib
import io
import warnings
from collections import defaultdict

import torch
from mmengine.registry import init_default_scope
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode

import mmpeft
from mmpeft.analysis.explain import explain
from mmpeft.engine.config import read_config
from mmpeft.engine.launch import run
from mmpeft.engine.packages import import_task
from mmpeft.execution import CHOICES
from mmpeft.registry import MODELS


def main():
    args = parse_args()
    cfg = read_config(args.config)
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    cfg.model.backbone.update(checkpoint=None)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter('ignore')
        import_task(cfg)
        init_default_scope(cfg.default_scope)
        backbone = MODELS.build(cfg.model.backbone)
        peft = dict(cfg.default_hooks.peft)
        targets = dict(peft['targets'], module='')
        execution = args.execution or peft.get('execution', 'auto')
        mmpeft.inject(
            backbone, peft['method'], targets, peft.get('unfreeze', ()), execution=execution
        )
    with FakeTensorMode(allow_non_fake_inputs=True):
        images = torch.randn(args.batch, 3, *args.size)
        show(explain(backbone, lambda: backbone(images)))


def parse_args():
    from mmengine.config import DictAction

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config')
    parser.add_argument('--size', type=int, nargs=2, default=[800, 1344], help='height, width')
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--execution', choices=CHOICES, help="instead of the config's")
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    return parser.parse_args()


def show(rows):
    """Print one line a group of equal layers, and the sum."""
    groups = defaultdict(list)
    for row in rows:
        groups[row.kind.replace('Parametrized', ''), row.tokens, row.way, row.floor].append(row)
    table = Table('layers', 'kind', 'tokens', 'way', 'GMAC', 'adapter GMAC', 'ratio')
    for (kind, tokens, way, floor), members in groups.items():
        table.add_row(
            f'{len(members)} x, such as {members[0].path}',
            kind,
            f'{tokens:,}',
            way,
            f'{floor * len(members) / 1e9:.2f}',
            f'{sum(m.extra for m in members) / 1e9:.2f}',
            f'{members[0].ratio:.3f}',
        )
    console = Console()
    console.print(table)
    floor, extra = sum(row.floor for row in rows), sum(row.extra for row in rows)
    console.print(
        f'{floor / 1e9:.1f} GMAC in the adapted layers with the input gradients (the floor), '
        f'{extra / 1e9:.1f} more for the adapters: {1 + extra / floor:.3f} times.'
    )


if __name__ == '__main__':
    run(main)
