"""Train a config with several ranks, scales or other values, and draw the score over them.

    python tools/sweep.py configs/flora/convnext_coco.py --over rank=8,16,32,64 --seeds 0 1 2
    python tools/sweep.py configs/frozen/convnext_ade20k.py --method flora \\
        --over scale=0.04,0.4,4 rank=16,32

All combinations are trained, each with every seed, and tested at the end. A key is an argument of
the method or a dotted key of the config; the first one is the axis of the picture. Finished runs
are kept in WORK_DIR/runs.jsonl and not run again; an interrupted one goes on.
"""

from pathlib import Path

from mmpeft.analysis.curves import draw_curves, points, score_name, table
from mmpeft.engine.command_line import add_config_arguments, parser_of, run, show
from mmpeft.engine.config import compose, run_name
from mmpeft.engine.data_check import check_data
from mmpeft.engine.key_values import KeyValues
from mmpeft.engine.packages import import_task
from mmpeft.engine.runs import sweep


def parse_args():
    parser = parser_of(__doc__)
    add_config_arguments(parser)
    parser.add_argument(
        '--over', nargs='+', action=KeyValues, required=True, help='values as key=value,value'
    )
    parser.add_argument('--seeds', nargs='+', type=int, default=[0])
    parser.add_argument(
        '--score', help="what is drawn, such as coco/segm_mAP; the task's own if out"
    )
    parser.add_argument('--work-dir', help='where records, logs, checkpoints and the picture go')
    return parser.parse_args()


def main():
    args = parse_args()
    cfg = compose(args.config, args.method, args.cfg_options)
    check_data(cfg, ('train', 'test'))
    import_task(cfg)
    name = run_name(args.config, args.method)
    work_dir = Path(args.work_dir or f'work_dirs/sweeps/{name}')
    over = {key: v if isinstance(v, list) else [v] for key, v in args.over.items()}
    records = sweep(cfg, work_dir, over, args.seeds)
    score = score_name(records, args.score)
    found = points(records, score)
    show(table(found, score, name))
    picture = work_dir / f'{"_".join(over)}.png'
    draw_curves(found, score, name).savefig(picture)
    print(f'written: {picture}')


if __name__ == '__main__':
    run(main)
