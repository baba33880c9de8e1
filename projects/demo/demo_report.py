"""What the demo ends with: figures, files and a sheet of pictures."""

import contextlib
import io
import warnings

import torch
from demo_pictures import draw_sheet
from rich.console import Console
from rich.table import Table

from mmpeft.engine.building import adapt, build_model

SCORES = {
    'coco/bbox_mAP': 'box AP',
    'coco/segm_mAP': 'mask AP',
    'dota/mAP': 'mAP',
    'dota/AP50': 'AP50',
    'mIoU': 'mIoU',
    'aAcc': 'pixel accuracy',
    'accuracy/top1': 'top-1 %',
}


def show_report(experiments):
    """Print the report of a frozen and an adapted experiment.

    Args:
        experiments (list[Experiment]): Evaluated; the adapted one last, merged
            if its method allows it.
    """
    adapted, console = experiments[-1], Console()
    console.rule('what was adapted')
    console.print(str(summary_of(adapted.cfg)), highlight=False)
    console.rule(f'after {adapted.steps} steps each, seed {adapted.seed}')
    console.print(score_table(experiments))
    console.rule('files')
    weights = torch.load(adapted.checkpoint, map_location='cpu', weights_only=False)['state_dict']
    trained = mib(sum(weight.numel() * weight.element_size() for weight in weights.values()))
    rows = [
        (adapted.checkpoint, f'adapters, neck and heads {trained}, the rest is the optimizer'),
        (adapted.config, 'the config, for tools/test.py'),
    ]
    if adapted.merges:
        rows.append((adapted.merged, 'the whole model, without adapters'))
        rows.append((adapted.merged.with_suffix('.py'), 'its config'))
    sheet = adapted.folder / 'pictures.png'
    with quiet():
        draw_sheet(experiments, sheet)
    rows.append((sheet, f'truth, and what {" and ".join(e.method for e in experiments)} found'))
    for path, remark in rows:
        line = f'{mib(path.stat().st_size):>9}  {path}  ({remark})'
        console.print(line, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def quiet():
    """Without what libraries print, and without warnings, which the logs of the runs have."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


def mib(size):
    """Bytes as text in MiB."""
    return f'{size / 2**20:.1f} MiB'


def summary_of(cfg):
    """Count a config's parameters, on a model without weights."""
    with quiet():
        return adapt(build_model(cfg, meta=True), cfg)


def score_table(experiments):
    """One row a model: the method in its backbone, and its scores."""
    rows = [(e.method, e.scores()) for e in experiments]
    adapted = experiments[-1]
    if adapted.merges:
        rows.append((f'{adapted.method}, merged', adapted.scores(merged=True)))
    names = [name for name in SCORES if name in rows[0][1]]
    table = Table('backbone', *(SCORES[name] for name in names))
    for method, scores in rows:
        table.add_row(method, *(f'{scores[name]:.3f}' for name in names))
    return table
