"""A table of finished trainings: scores by method, over seeds, and what trains.

    for method in lora flora bitfit; do
        for seed in 0 1 2; do
            python tools/train.py CONFIG --method $method --work-dir runs/$method/$seed \\
                --cfg-options randomness.seed=$seed
        done
    done
    python projects/demo/compare_runs.py runs/*/* --out runs/table.md
"""

import argparse
import json
import statistics
import warnings
from pathlib import Path

from mmpeft.engine.building import adapt, build_model
from mmpeft.engine.command_line import run
from mmpeft.engine.config import find_hook, read_config
from mmpeft.engine.method_argument import methods_in
from mmpeft.errors import MissingFileError
from mmpeft.registry import METHODS

SCORES = ('coco/bbox_mAP', 'coco/segm_mAP', 'mIoU', 'dota/mAP', 'accuracy/top1')


def compare(folders):
    """Work directories of trainings, those of equal methods in one row.

    Args:
        folders (list[str | Path]): Each with the config that training wrote, and its logs.

    Returns:
        ``method``, ``runs``, ``parameters`` that train in the target module,
        median ``seconds`` a step, and ``scores``: mean and standard deviation
        (None of a single run). The best first, by the first score.

    Raises:
        MissingFileError: A folder holds no config, or no evaluation.
    """
    groups = {}
    for folder in map(Path, folders):
        configs = sorted(folder.glob('*.py'))
        if not configs:
            raise MissingFileError(f'{str(folder)!r} holds no config of a training.')
        cfg, (scores, seconds) = read_config(configs[0]), _logged(folder)
        methods = [str(METHODS.build(each)) for each in methods_in(find_hook(cfg) or {})]
        row = dict(method=' + '.join(methods) or 'no adapters', cfg=cfg, scores=[], seconds=[])
        row = groups.setdefault(row['method'], row)
        row['scores'].append(scores)
        row['seconds'].append(seconds)
    rows = [
        dict(
            method=row['method'],
            runs=len(row['scores']),
            parameters=_parameters(row['cfg']),
            seconds=statistics.median(row['seconds']),
            scores={name: _spread([s[name] for s in row['scores']]) for name in row['scores'][0]},
        )
        for row in groups.values()
    ]
    return sorted(rows, key=lambda row: -next(iter(row['scores'].values()))[0])


def markdown(rows):
    """The rows of :func:`compare` as a table."""
    names = list(rows[0]['scores'])
    lines = [['method', 'parameters', *names, 'runs', 's/step']]
    lines.append(['---', *['---:'] * (len(lines[0]) - 1)])
    for row in rows:
        size = '' if row['parameters'] is None else f'{row["parameters"]:,}'
        spread = [row['scores'].get(name, (float('nan'), None)) for name in names]
        scores = [f'{m:.3f}' if s is None else f'{m:.3f} ± {s:.3f}' for m, s in spread]
        lines.append([row['method'], size, *scores, str(row['runs']), f'{row["seconds"]:.2f}'])
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _logged(folder):
    """Scores of the last evaluation, and the median seconds of a step."""
    files = sorted(folder.glob('*/vis_data/scalars.json'))
    lines = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    evaluations = [line for line in lines if not {'loss', 'update/norm'} & line.keys()]
    if not evaluations:
        raise MissingFileError(f'{str(folder)!r} holds no evaluation; the training has not ended.')
    known = {name: evaluations[-1][name] for name in SCORES if name in evaluations[-1]}
    others = {k: v for k, v in evaluations[-1].items() if k not in ('data_time', 'time', 'step')}
    times = [line['time'] for line in lines if 'loss' in line]
    return known or others, statistics.median(times) if times else float('nan')


def _parameters(cfg):
    if find_hook(cfg) is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        summary = adapt(build_model(cfg, meta=True), cfg)
    return summary.adapters + summary.unfrozen


def _spread(values):
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


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
