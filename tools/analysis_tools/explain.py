"""How each adapted layer of a config's backbone is computed, and what that costs.

    python tools/analysis_tools/explain.py configs/flora/convnext_coco.py [--size 800 1344]

The forward pass runs on tensors without data. Costs are multiply-adds of
products and convolutions in forward and backward; passes over memory are not
counted.
"""

import warnings
from collections import defaultdict

import torch
from rich.table import Table

from mmpeft.analysis.explain import explain
from mmpeft.analysis.images import check_images, refusing
from mmpeft.analysis.memory import built_without_data
from mmpeft.engine.building import build_adapted
from mmpeft.engine.command_line import add_config_arguments, parser_of, run, show
from mmpeft.engine.config import compose, find_hook
from mmpeft.errors import UsageError
from mmpeft.execution import CHOICES
from mmpeft.injection.site import attached


def parse_args():
    parser = parser_of(__doc__)
    add_config_arguments(parser)
    parser.add_argument('--size', type=int, nargs=2, default=[800, 1344], metavar=('H', 'W'))
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--execution', choices=CHOICES, help="instead of the config's")
    return parser.parse_args()


def main():
    args = parse_args()
    check_images([args.batch], args.size)
    cfg = compose(args.config, args.method, args.cfg_options)
    hook = find_hook(cfg)
    if args.execution and hook is not None:
        hook.execution = args.execution
    warnings.simplefilter('ignore')
    model, mode = built_without_data(lambda: build_adapted(cfg))
    acting = sum(not site.tensor for site in attached(model))
    if acting:
        print(f'{acting} adapters on activations are not counted below.')
    with mode, refusing(args.size):
        images = torch.randn(args.batch, 3, *args.size)
        rows = explain(model.backbone, lambda: model.backbone(images))
    if not rows:
        methods = ' and '.join(type(record.method).__name__ for record in model.peft)
        raise UsageError(
            f'{methods} adapts no weight of a linear layer or convolution here, so there is '
            'nothing to explain.'
        )
    print_costs(rows)


def print_costs(rows):
    """Print one line a group of equal layers, and the sum."""
    groups = defaultdict(list)
    for row in rows:
        groups[row.kind.replace('Parametrized', ''), row.tokens, row.kernel, row.floor].append(row)
    table = Table('layers', 'kind', 'tokens', 'kernel', 'GMAC', 'adapter GMAC', 'ratio')
    for (kind, tokens, kernel, floor), members in groups.items():
        table.add_row(
            f'{len(members)} x, such as {members[0].path}',
            kind,
            f'{tokens:,}',
            kernel,
            f'{floor * len(members) / 1e9:.2f}',
            f'{sum(m.extra for m in members) / 1e9:.2f}',
            f'{members[0].ratio:.3f}',
        )
    show(table)
    floor, extra = sum(row.floor for row in rows), sum(row.extra for row in rows)
    print(
        f'{floor / 1e9:.1f} GMAC in the adapted layers with the input gradients (the floor), '
        f'{extra / 1e9:.1f} more for the adapters: {1 + extra / max(floor, 1):.3f} times.'
    )


if __name__ == '__main__':
    run(main)
