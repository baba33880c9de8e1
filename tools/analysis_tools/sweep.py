"""Train several methods on one config with several seeds, and compare them.

    python tools/analysis_tools/sweep.py configs/demo/coco.py --methods lora flora --seeds 0 1 2 \\
        --budget 280k --cfg-options load_from=detector.pth

Runs go one after another. What has ended is kept unless its arguments change,
so that an interrupted sweep goes on, and one with more methods or seeds adds to
it. A run that fails does not stop the others.
"""

import argparse
import json
from pathlib import Path

from mmpeft.engine.launch import check_checkpoint, run
from mmpeft.engine.sweep import Run, compare, markdown

TRAIN = Path(__file__).resolve().parents[1] / 'train.py'


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file, or package::path')
    parser.add_argument('--methods', nargs='+', required=True, help='each as for train.py --method')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument('--budget', help='adapter parameters of methods with a rank, such as 280k')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/sweep'))
    parser.add_argument('--cfg-options', nargs='+', default=[], help='as for train.py')
    return parser.parse_args()


def main():
    args = parse_args()
    options = tuple(args.cfg_options)
    for option in options:
        if option.startswith('load_from='):
            check_checkpoint(option.partition('=')[2])
    runs = [
        Run(args.config, method, seed, options, args.budget, args.out)
        for seed in args.seeds
        for method in args.methods
    ]
    missing = [each for each in runs if 'scores' not in each.result()]
    for number, each in enumerate(missing, 1):
        print(f'{number} of {len(missing)}: {each.folder}', flush=True)
        each.train(TRAIN)
    rows = compare(runs)
    table = markdown(rows)
    (args.out / 'results.md').write_text(table)
    (args.out / 'results.json').write_text(json.dumps(rows, indent=2))
    print(f'{table}\nwritten: {args.out}/results.md, results.json')


if __name__ == '__main__':
    run(main)
