"""What the demo ends with: figures, files and a sheet of pictures."""

import contextlib
import io
import warnings

import cv2
import numpy as np
import torch
from mmengine.registry import init_default_scope
from rich.console import Console
from rich.table import Table

import mmpeft
from mmpeft.engine.packages import import_task
from mmpeft.registry import MODELS

SCORES = {
    'coco/bbox_mAP': 'box AP',
    'coco/segm_mAP': 'mask AP',
    'dota/mAP': 'mAP',
    'dota/AP50': 'AP50',
    'mIoU': 'mIoU',
    'aAcc': 'pixel accuracy',
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
    trained = trained_size(adapted.checkpoint)
    remark = f'adapters, neck and heads {mib(trained)}, the rest is the optimizer'
    rows = [(adapted.checkpoint, remark), (adapted.config, 'the config, for tools/test.py')]
    if adapted.merges:
        rows.append((adapted.merged, 'the whole model, without adapters'))
        rows.append((adapted.merged.with_suffix('.py'), 'its config'))
    for experiment in experiments:
        pictures = experiment.evaluation().pictures()
        sheet = contact_sheet(pictures, experiment.folder / 'pictures.png')
        rows.append((sheet, 'truth and prediction side by side'))
    rows.append((pictures[0].parent, f'{len(pictures)} such pictures'))
    for path, remark in rows:
        size = mib(path.stat().st_size) if path.is_file() else ''
        console.print(f'{size:>9}  {path}  ({remark})', highlight=False, soft_wrap=True)


def trained_size(checkpoint):
    """Bytes of the weights in a checkpoint of training."""
    weights = torch.load(checkpoint, map_location='cpu', weights_only=False)['state_dict']
    return sum(weight.numel() * weight.element_size() for weight in weights.values())


def mib(size):
    """Bytes as text in MiB."""
    return f'{size / 2**20:.1f} MiB'


def summary_of(cfg):
    """Count a config's parameters, on a model without weights."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        import_task(cfg)
        init_default_scope(cfg.default_scope)
        peft = dict(cfg.default_hooks.peft)
        model = MODELS.build(cfg.model)
        return mmpeft.inject(model, peft['method'], peft['targets'], peft.get('unfreeze', ()))


def score_table(experiments):
    """One row a model: what trains in its backbone, and its scores."""
    rows = [(e.method, e.evaluation().scores()) for e in experiments]
    adapted = experiments[-1]
    if adapted.merges:
        rows.append((f'{adapted.method}, merged', adapted.evaluation_of_merged().scores()))
    names = [name for name in SCORES if name in rows[0][1]]
    table = Table('backbone', *(SCORES[name] for name in names))
    for method, scores in rows:
        table.add_row(method, *(f'{scores[name]:.3f}' for name in names))
    return table


def contact_sheet(pictures, path, columns=4, rows=3):
    """Lay pictures of one size beside each other, and write the sheet.

    Args:
        pictures (list[Path]): The first ``columns * rows`` are used.
        path (Path): Where the sheet goes.

    Returns:
        Path: ``path``.
    """
    tiles = [cv2.imread(str(picture)) for picture in pictures[: columns * rows]]
    tiles = [cv2.resize(tile, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC) for tile in tiles]
    tiles = [np.pad(tile, ((4, 4), (4, 4), (0, 0)), constant_values=255) for tile in tiles]
    lines = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    lines = [np.hstack(line) for line in lines if len(line) == columns]
    cv2.imwrite(str(path), np.vstack(lines))
    return path
