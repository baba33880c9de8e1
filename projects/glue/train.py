"""Fine-tune an encoder on a task, and save the adapter.

    python projects/glue/train.py projects/glue/configs/subspace_roberta_base.py --task rte \
        --method flora_r2 --out work_dirs/rte
    python projects/glue/train.py projects/glue/configs/liera_deberta_v3_base.py --method dora \
        --data data/letters --sentences subject body --out work_dirs/letters

The folder gets ``adapter.safetensors``, which has the head too, and ``run.json``: the scores and
all that evaluate.py needs.
"""

import argparse
import json
from pathlib import Path

from glue.cli import add_arguments, read_config, run, task_of, texts_of
from glue.trial import Trial, run_trial

from mmpeft.engine.method_argument import method_name
from mmpeft.errors import UsageError


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument('--task', help='of GLUE; none for a data set of your own')
    parser.add_argument('--method', required=True, help="the config's, or any of --method")
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--out', type=Path, help='work_dirs/glue/TASK_METHOD_seedSEED by default')
    args = parser.parse_args(arguments)
    config = read_config(args)
    task = task_of(config, args.task)
    out = args.out or Path('work_dirs/glue', f'{task}_{method_name(args.method)}_seed{args.seed}')
    if (out / 'run.json').exists():
        raise UsageError(f'{str(out)!r} has a run already. Name another folder with --out.')
    texts = texts_of(config, task)
    trial = Trial(task, args.method, args.seed)
    record = run_trial(config, trial, texts, config['model'], out, save=True)
    data = {key: config[key] for key in ('data', 'sentences', 'label')}
    data['classes'] = texts.classes
    (out / 'run.json').write_text(json.dumps(record | data, indent=2) + '\n')
    print(json.dumps(record['scores']))


if __name__ == '__main__':
    run(main)
