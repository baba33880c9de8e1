"""Run methods over tasks and seeds, and print them as the papers do.

    python projects/glue/table.py run projects/glue/configs/subspace_roberta_base.py \
        --tasks cola rte --methods lora_r2 flora_r2 --seeds 5
    python projects/glue/table.py print projects/glue/configs/subspace_roberta_base.py
    python projects/glue/table.py shares projects/glue/configs/subspace_roberta_base.py

A run can be stopped and started again: each trial appends one line to the records when it ends, and
what has a line is not run again.
"""

import argparse
import sys
from pathlib import Path

from glue.cli import add_arguments, read_config, run, tasks_of, texts_of
from glue.models import hook_of, weights_sha256
from glue.plan import pending, read_records, result
from glue.report import differences, table
from glue.shares import shares
from glue.trial import run_trial

from mmpeft.checkpoint.journal import append_record
from mmpeft.errors import MissingFileError


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('command', choices=('run', 'print', 'shares'))
    add_arguments(parser)
    parser.add_argument('--tasks', nargs='+', help='of GLUE; all by default')
    parser.add_argument('--methods', nargs='+', help="the config's by default, or any of --method")
    parser.add_argument('--seeds', type=int, default=5)
    parser.add_argument('--records', type=Path, nargs='+', help='files; a run adds to the first')
    parser.add_argument('--against', help='print paired differences to this method')
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    config = read_config(args)
    if args.command == 'shares':
        print(shares(config))
        return
    tasks = tasks_of(config, args.tasks)
    methods = args.methods or list(config['methods'])
    for method in (*methods, *filter(None, [args.against])):
        hook_of(config['methods'], method)  # raises for what is wrong
    files = args.records or [Path('work_dirs/glue') / f'{args.config.stem}.jsonl']
    missing = [file for file in files if not file.is_file()]
    if args.command == 'print' and missing:
        raise MissingFileError(
            f'There are no records in {str(missing[0])!r}. "table.py run" writes them; name other '
            'files by --records.'
        )
    records = read_records(files)
    if args.command == 'print':
        known = {r['task']: r['sha256'] for r in records.values() if 'sha256' in r}
        if known:  # those that are printed have to agree
            data = {task: digests['data'] for task, digests in known.items()}
            config['sha256'] = dict(data=data, model=next(iter(known.values()))['model'])
        print(table(config, tasks, methods, args.seeds, records))
        models = {record['model'] for record in records.values() if 'model' in record}
        print(f'Models of the records: {", ".join(sorted(models))}', file=sys.stderr)
        if args.against:
            print(differences(config, tasks, methods, args.seeds, records, args.against))
        return
    texts = {task: texts_of(config, task) for task in tasks}
    data = {task: texts[task].sha256 for task in tasks}
    config['sha256'] = dict(data=data, model=weights_sha256(config['model']))
    folder = Path('work_dirs/glue') / args.config.stem
    for trial in pending(config, tasks, methods, args.seeds, records):
        record = dict(id=trial.id)
        record |= run_trial(config, trial, texts[trial.task], config['model'], folder)
        append_record(files[0], record)
        records[trial.id] = record
        print(f'{trial.id}: {100 * result(record):.2f} in {record["seconds"]} s', flush=True)


if __name__ == '__main__':
    run(main)
