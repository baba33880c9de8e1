"""Train and test a method on the tasks of VTAB-1k, and print the table.

    python projects/vtab/benchmark.py configs/liera/convnext_vtab.py --seeds 0 1 2
    python projects/vtab/benchmark.py configs/frozen/convnext_vtab.py --method dora \\
        --tasks cifar dtd --grid optim_wrapper.optimizer.lr=3e-4,1e-3,3e-3

With ``--grid`` each task takes the values that are best on val200 after training on train800.
Then it is trained on all 1,000 images and tested once, after the last epoch. Finished runs are
kept in WORK_DIR/runs.jsonl and not run again; calls with other tasks can run side by side.
"""

import argparse
from pathlib import Path

from vtab.protocol import benchmark
from vtab.report import table
from vtab.tasks import TASKS

from mmpeft.engine.command_line import add_config_arguments, parser_of, run, show
from mmpeft.engine.config import compose, run_name
from mmpeft.engine.key_values import KeyValues
from mmpeft.engine.packages import import_task


def parse_args() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add_config_arguments(parser)
    parser.add_argument('--tasks', nargs='+', default=list(TASKS), help='all 19 if left out')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0])
    parser.add_argument(
        '--grid',
        nargs='+',
        action=KeyValues,
        default={},
        help='values to choose from for each task, as key=value,value',
    )
    parser.add_argument('--data', help="folder of the tasks; the config's if left out")
    parser.add_argument('--work-dir', help='where records, logs and checkpoints go')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    cfg = compose(args.config, args.method, args.cfg_options)
    import_task(cfg)
    name = run_name(args.config, args.method)
    grid = {k: v if isinstance(v, list) else [v] for k, v in args.grid.items()}
    work_dir = Path(args.work_dir or f'work_dirs/{name}')
    work_dir.mkdir(parents=True, exist_ok=True)
    records = benchmark(cfg, work_dir, args.tasks, args.seeds, grid, args.data)
    show(table(records, name))


if __name__ == '__main__':
    run(main)
