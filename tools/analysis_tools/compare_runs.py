"""A table of finished trainings: scores by method, over seeds, and what trains.

    for method in lora flora bitfit; do
        for seed in 0 1 2; do
            python tools/train.py CONFIG --method $method --work-dir runs/$method/$seed \\
                --cfg-options randomness.seed=$seed
        done
    done
    python tools/analysis_tools/compare_runs.py runs/*/* --out runs/table.md
"""

import argparse
from pathlib import Path

from mmpeft.engine.launch import run
from mmpeft.engine.runs import compare, markdown


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('work_dirs', nargs='+', help='of trainings on one task')
    parser.add_argument('--out', type=Path, help='file to write the table to')
    args = parser.parse_args()
    table = markdown(compare(args.work_dirs))
    print(table)
    if args.out:
        args.out.write_text(f'{table}\n')


if __name__ == '__main__':
    run(main)
