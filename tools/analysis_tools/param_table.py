"""What a config adapts and how many parameters that takes, without weights or data.

    python tools/analysis_tools/param_table.py configs/lora/convnext_coco.py --rank 8 16 32

The model is built on the meta device, adapted as the config's
default_hooks.peft says, and counted as ``mmpeft.summary`` does.
"""

import argparse
import copy
import csv
import io
import json
import sys
import warnings
from collections import defaultdict
from pathlib import Path

import torch
from mmengine.config import DictAction
from mmengine.registry import MODELS, init_default_scope
from rich.console import Console
from rich.table import Table

import mmpeft
from mmpeft.engine.config import compose
from mmpeft.engine.launch import run
from mmpeft.engine.packages import import_task
from mmpeft.errors import UsageError

COLUMNS = ('rank', 'name', 'kind', 'method', 'shape', 'weight', 'adapter', 'share')
FORMATS = ('.csv', '.json', '.md')


def parse_args():
    parser = argparse.ArgumentParser(description='Count the parameters that a config adapts')
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--rank', type=int, nargs='+', help="ranks in place of the config's; totals are compared"
    )
    parser.add_argument('--out', type=Path, help='write all rows to a .csv, .json or .md file')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='overrides: key=value')
    return parser.parse_args()


def summarize(cfg, rank=None):
    """Build, adapt and count a config's model.

    Args:
        cfg (Config): With ``model`` and ``default_hooks.peft``.
        rank (int, optional): In place of the method's.

    Returns:
        mmpeft.injection.summary.Summary: Of the adapted model.

    Raises:
        UsageError: The config has no adapters, or its method no rank.
    """
    hook = dict(cfg.get('default_hooks', {}).get('peft') or {})
    if not hook:
        raise UsageError(
            f'{cfg.filename} has no default_hooks.peft, so nothing is adapted. Inherit '
            "'mmpeft::_base_/methods/flora.py' and set default_hooks = dict(peft=_base_.peft)."
        )
    method = dict(hook['method'])
    if rank is not None:
        kind = mmpeft.METHODS.get(method['type'])
        if kind is not None and not hasattr(kind, 'rank'):
            raise UsageError(f'--rank {rank}: {method["type"]} has no rank. Leave --rank out.')
        method |= dict(rank=rank, budget=None)
    targets = dict(module='backbone') | dict(hook.get('targets') or {})
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # weights that are outgrown are marked in the table
        return mmpeft.inject(build(cfg.model), method, targets, hook.get('unfreeze', ()))


def build(model):
    """A model on the meta device; in memory where its code reads numbers off tensors.

    mmdet's Swin and mmseg's MiT do so with their drop-path rates.
    """
    try:
        with torch.device('meta'):
            return MODELS.build(copy.deepcopy(model))
    except RuntimeError:
        return MODELS.build(copy.deepcopy(model))


def rows_of(summaries):
    """The adapted weights of all summaries, as texts and numbers for :data:`COLUMNS`."""
    return [
        (
            '' if rank is None else rank,
            row.name,
            row.kind,
            row.method,
            'x'.join(map(str, row.shape)),
            row.weight,
            row.adapter,
            row.adapter / row.weight,
        )
        for rank, summary in summaries.items()
        for row in summary.rows
    ]


def layer_table(summary, title):
    """One line a weight; those that the adapter outgrows stand out."""
    table = Table(title=title)
    table.add_column(f'weight below {summary.module}', overflow='fold')
    table.add_column('kind')
    table.add_column('shape')
    for column in ('parameters', 'adapter', 'share'):
        table.add_column(column, justify='right')
    for row in summary.rows:
        table.add_row(
            row.name.removeprefix(f'{summary.module}.'),
            row.kind,
            'x'.join(map(str, row.shape)),
            f'{row.weight:,}',
            f'{row.adapter:,}',
            f'{row.adapter / row.weight:.1%}',
            style='yellow' if row.adapter > row.weight else None,
        )
    return table


def kind_table(summaries):
    """Adapter parameters by kind of layer, and totals: one column a rank."""
    table = Table('', title='adapter parameters')
    kinds = defaultdict(dict)
    for rank, summary in summaries.items():
        table.add_column('' if rank is None else f'rank {rank}', justify='right')
        for row in summary.rows:
            kinds[row.kind][rank] = kinds[row.kind].get(rank, 0) + row.adapter
    for kind, counts in kinds.items():
        table.add_row(kind, *(f'{counts.get(rank, 0):,}' for rank in summaries))
    table.add_section()
    for name in ('adapters', 'unfrozen', 'base', 'outside'):
        table.add_row(name, *(f'{getattr(s, name):,}' for s in summaries.values()))
    table.add_row('share', *(f'{s.share:.2%}' for s in summaries.values()))
    return table


def write(path, summaries):
    """Write all rows, with the totals where the format has a place for them."""
    rows = rows_of(summaries)
    if path.suffix == '.json':
        content = [dict(rank=rank) | summary.to_dict() for rank, summary in summaries.items()]
        text = json.dumps(content, indent=2)
    elif path.suffix == '.csv':
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator='\n')
        writer.writerow(COLUMNS)
        writer.writerows(rows)
        text = buffer.getvalue()
    else:
        lines = ['| ' + ' | '.join(COLUMNS) + ' |', '|' + ' --- |' * len(COLUMNS)]
        for *words, weight, adapter, share in rows:
            cells = [*map(str, words), f'{weight:,}', f'{adapter:,}', f'{share:.1%}']
            lines.append(f'| {" | ".join(cells)} |')
        totals = ', '.join(f'{s.adapters:,}' for s in summaries.values())
        text = '\n'.join([*lines, '', f'adapter parameters: {totals}']) + '\n'
    path.write_text(text)


def main():
    args = parse_args()
    if args.out and args.out.suffix not in FORMATS:
        raise UsageError(f'--out {args.out}: the name must end in {", ".join(FORMATS)}.')
    cfg = compose(args.config, options=args.cfg_options)
    import_task(cfg)
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    summaries = {rank: summarize(cfg, rank) for rank in args.rank or [None]}
    console = Console(width=None if sys.stdout.isatty() else 120)
    first = next(iter(summaries))
    title = f'{args.config}' + ('' if first is None else f', rank {first}')
    console.print(layer_table(summaries[first], title))
    console.print(kind_table(summaries))
    if args.out:
        write(args.out, summaries)
        console.print(f'written: {args.out}')


if __name__ == '__main__':
    run(main)
