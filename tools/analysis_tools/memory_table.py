"""What training a config takes in memory, before a GPU is there to try it.

    python tools/analysis_tools/memory_table.py configs/flora/internvit_ade20k.py --batch 1 2
    python tools/analysis_tools/memory_table.py mmdet::yolox/yolox_s_8xb8-300e_coco --method lora

Weights, gradients and AdamW's state are counted. What forward saves for
backward in the backbone is taken from a forward pass on tensors without data,
which runs the same operators; the activations of neck and heads are not
counted.
"""

import warnings
from functools import partial
from pathlib import Path

from mmpeft.analysis.images import check_images
from mmpeft.analysis.memory import predict
from mmpeft.analysis.memory_table import table, write
from mmpeft.analysis.parameters import check_format
from mmpeft.engine.building import build_adapted
from mmpeft.engine.command_line import add_config_arguments, parser_of, run, show
from mmpeft.engine.config import compose


def parse_args():
    parser = parser_of(__doc__)
    add_config_arguments(parser, nargs='+')
    parser.add_argument('--size', type=int, nargs=2, default=[504, 504], metavar=('H', 'W'))
    parser.add_argument('--batch', type=int, nargs='+', default=[1], help='images a GPU')
    parser.add_argument('--out', type=Path, help='write bytes to a .csv or .json file, or .md')
    return parser.parse_args()


def main():
    args = parse_args()
    check_images(args.batch, args.size)
    if args.out:
        check_format(args.out)
    warnings.simplefilter('ignore')
    rows = []
    for config in args.config:
        cfg = compose(config, args.method, args.cfg_options)
        for batch in args.batch:
            memory = predict(partial(build_adapted, cfg), (batch, 3, *args.size))
            rows.append((f'{config}, {batch}', memory))
    show(table(rows), width=160)
    if args.out:
        write(args.out, rows)
        print(f'written: {args.out}')


if __name__ == '__main__':
    run(main)
