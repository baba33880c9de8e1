"""What a config adapts and how many parameters that takes, without weights or data.

    python tools/analysis_tools/param_table.py configs/lora/convnext_coco.py --rank 8 16 32
    python tools/analysis_tools/param_table.py mmdet::yolox/yolox_tiny_8xb8-300e_coco --method dora

The model is built without memory, adapted as the config's hook says, and
counted as ``mmpeft.summary`` does.
"""

import warnings
from pathlib import Path

from mmpeft.analysis.parameters import check_format, kind_table, layer_table, write
from mmpeft.engine.building import adapt, build_model
from mmpeft.engine.command_line import add_config_arguments, parser_of, run, show
from mmpeft.engine.config import compose


def parse_args():
    parser = parser_of(__doc__)
    add_config_arguments(parser)
    parser.add_argument(
        '--rank', type=int, nargs='+', help="ranks in place of the config's; totals are compared"
    )
    parser.add_argument('--out', type=Path, help='write all rows to a .csv, .json or .md file')
    return parser.parse_args()


def main():
    args = parse_args()
    if args.out:
        check_format(args.out)
    cfg = compose(args.config, args.method, args.cfg_options)
    warnings.simplefilter('ignore')  # oversized adapters are marked in the table
    ranks = args.rank or [None]
    summaries = {rank: adapt(build_model(cfg, meta=True), cfg, rank) for rank in ranks}
    title = ' '.join(str(word) for word in (args.config, args.method) if word)
    show(layer_table(summaries[ranks[0]], title), kind_table(summaries))
    if args.out:
        write(args.out, summaries)
        print(f'written: {args.out}')


if __name__ == '__main__':
    run(main)
