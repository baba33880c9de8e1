"""How a method changed the weights: norms, amplification, ranks, and pictures of kernels.

    python tools/analysis_tools/updates.py configs/flora/convnext_coco.py CHECKPOINT
    python tools/analysis_tools/updates.py configs/frozen/convnext_coco.py CHECKPOINT \\
        --method lora --against OTHER --against-method flora --out updates.csv
    python tools/analysis_tools/updates.py configs/flora/convnext_coco.py CHECKPOINT \\
        --kernels 'stages_0.*conv_dw' --pictures pictures/

CHECKPOINT is one of training or an adapter file. docs/updates.md says what the columns are.
"""

from pathlib import Path

import mmpeft
from mmpeft.analysis.kernels import check_kernel, draw_kernels
from mmpeft.analysis.parameters import check_format
from mmpeft.analysis.update_table import update_table, write_updates
from mmpeft.analysis.updates import (
    adapted_weights,
    cosines,
    figures,
    update_of,
    updates,
    without_updates,
)
from mmpeft.engine.command_line import add_config_arguments, parser_of, run, show
from mmpeft.errors import UsageError
from mmpeft.injection.patterns import matching


def parse_args():
    parser = parser_of(__doc__)
    add_config_arguments(parser)
    parser.add_argument('checkpoint', help='checkpoint with adapters, or adapter file')
    parser.add_argument(
        '--against', metavar='OTHER', help='another one, for the cosines between the updates'
    )
    parser.add_argument('--against-method', help='the method of OTHER, as --method; else the same')
    parser.add_argument('--out', type=Path, help='write the table to a .csv, .json or .md file')
    parser.add_argument(
        '--kernels', nargs='+', default=(), help='patterns of convolutions that are drawn'
    )
    parser.add_argument('--count', type=int, default=8, help='kernels in a picture at most')
    parser.add_argument('--pictures', type=Path, default=Path(), help='where pictures go')
    parser.add_argument('--device', default='cpu', help='where it is computed')
    return parser.parse_args()


def main():
    args = parse_args()
    if args.out:
        check_format(args.out)
    if args.against_method and not args.against:
        raise UsageError('--against-method is the method of another file. Name it by --against.')
    if args.count < 1:
        raise UsageError(f'--count {args.count}: a picture has 1 kernel or more.')
    options = dict(device=args.device, options=args.cfg_options)
    model = mmpeft.init_model(args.config, args.checkpoint, method=args.method, **options)
    found, angles = adapted_weights(model), None
    drawn = matching(found, args.kernels, '--kernels', 'adapted weight')
    for name in drawn:
        check_kernel(name, found[name][0].spec)
    if args.against:
        method = args.against_method or args.method
        other = mmpeft.init_model(args.config, args.against, method=method, **options)
        angles = cosines(model, other)
    rows = figures(updates(model))
    show(update_table(rows, angles, args.checkpoint), width=160)
    for method, number in without_updates(model).items():
        print(f'left out: {number} adapters of {method}, which changes activations')
    if args.out:
        write_updates(args.out, rows, angles)
        print(f'written: {args.out}')
    args.pictures.mkdir(parents=True, exist_ok=True)
    for name in drawn:
        path = args.pictures / f'{name}.png'
        draw_kernels(update_of(found[name]), args.count).savefig(path)
        print(f'written: {path}')


if __name__ == '__main__':
    run(main)
