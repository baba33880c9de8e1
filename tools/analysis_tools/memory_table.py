"""What training a backbone takes in memory, before a GPU is there to try it.

    python tools/analysis_tools/memory_table.py configs/{flora,liera,full}/internvit_ade20k.py \\
        [--crop 504] [--batch 1 2] [--markdown docs/internvit_memory.md]

Weights, gradients and optimizer state are counted. What forward saves for
backward is taken from a forward pass on tensors without data, which run the
same operators; --check compares it with a real forward of fewer blocks.
Neck and heads count with their parameters, not with their activations.
"""

import argparse
import contextlib
import copy
import io
import warnings
from pathlib import Path

import torch
from mmengine.registry import init_default_scope
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode

import mmpeft
from mmpeft.engine.config import read_config
from mmpeft.engine.packages import import_task
from mmpeft.registry import MODELS

GIB = 2**30
COLUMNS = {
    'weights': 'weights',
    'gradients': 'gradients',
    'optimizer': 'AdamW',
    'saved': 'saved',
    'recomputed': 'saved, recomputing',
    'total': 'total',
    'total_recomputed': 'total, recomputing',
}


def main():
    args = parse_args()
    rows = []
    for path in args.configs:
        cfg = read_config(path)
        for batch in args.batch:
            rows.append(dict(config=str(path), batch=batch, **predict(cfg, args.crop, batch)))
    show(rows)
    if args.markdown:
        Path(args.markdown).write_text(markdown(rows, args.crop))
    for blocks in args.check:
        for path in args.configs:
            check(read_config(path), path, args.crop, blocks)


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('configs', nargs='+', type=Path)
    parser.add_argument('--crop', type=int, default=504, help='pixels of a side')
    parser.add_argument('--batch', type=int, nargs='+', default=[1, 2], help='images a GPU')
    parser.add_argument('--markdown', help='file that the table is written to')
    parser.add_argument(
        '--check', type=int, nargs='*', default=[], help='numbers of blocks to run in earnest'
    )
    return parser.parse_args()


def build(cfg, blocks=None, with_cp=False, backbone_alone=True):
    """A config's model with its adapters, of fewer blocks if asked for.

    Args:
        cfg (Config): Of training.
        blocks (int, optional): Depth of the backbone.
        with_cp (bool): Recompute activations.
        backbone_alone (bool): Leave neck and heads out.
    """
    cfg = copy.deepcopy(cfg)
    if blocks is not None:
        from mmpeft.models.intern_vit import ARCHITECTURES

        arch = ARCHITECTURES[cfg.model.backbone.arch]
        fields = {k: getattr(arch, k) for k in arch.__dataclass_fields__}
        cfg.model.backbone.update(arch=fields | dict(depth=blocks))
    cfg.model.backbone.update(with_cp=with_cp, checkpoint=None, drop_path=0.0)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        import_task(cfg)
        init_default_scope(cfg.default_scope)
        model = MODELS.build(cfg.model)
        peft = dict(cfg.default_hooks.peft)
        targets = peft.get('targets')
        mmpeft.inject(model, peft['method'], targets, peft.get('unfreeze', ()))
    return model.backbone if backbone_alone else model


def saved_bytes(model, images):
    """Bytes that a forward pass keeps for backward, parameters not counted.

    Args:
        model (nn.Module): Real, or made under a FakeTensorMode.
        images (torch.Tensor): Its input.
    """
    held = [*model.parameters(), *model.buffers()]
    own = {tensor.untyped_storage()._cdata for tensor in held}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model(images)
    del outputs
    return sum(storage.nbytes() for storage in seen.values())


def predict(cfg, crop, batch):
    """The table's figures of one config in bytes."""
    with torch.device('meta'):
        parameters = list(build(cfg, backbone_alone=False).parameters())
    trained = sum(4 * p.numel() for p in parameters if p.requires_grad)
    figures = dict(
        weights=sum(p.numel() * p.element_size() for p in parameters),
        gradients=trained,
        optimizer=2 * trained,
    )
    with FakeTensorMode():
        images = torch.randn(batch, 3, crop, crop)
        figures['saved'] = saved_bytes(build(cfg), images)
        one, two = (saved_bytes(build(cfg, blocks), images) for blocks in (4, 5))
        # While a block is recomputed, it alone is held beside the inputs of all.
        figures['recomputed'] = saved_bytes(build(cfg, with_cp=True), images) + two - one
    fixed = sum(figures[name] for name in ('weights', 'gradients', 'optimizer'))
    figures['total'] = fixed + figures['saved']
    figures['total_recomputed'] = fixed + figures['recomputed']
    return figures


def check(cfg, path, crop, blocks):
    """Print predicted and measured saved bytes of a shallower backbone."""
    for with_cp in (False, True):
        with FakeTensorMode():
            expected = saved_bytes(build(cfg, blocks, with_cp), torch.randn(1, 3, crop, crop))
        measured = saved_bytes(build(cfg, blocks, with_cp), torch.randn(1, 3, crop, crop))
        print(
            f'{path}, {blocks} blocks, {"recomputing" if with_cp else "saving all"}: '
            f'predicted {expected / 2**20:,.1f} MiB, measured {measured / 2**20:,.1f} MiB'
        )


def cells(row):
    """A row's words."""
    name = f'{Path(row["config"]).parent.name}, {row["batch"]}'
    return [name, *(f'{row[column] / GIB:.2f}' for column in COLUMNS)]


def show(rows):
    """Print the table."""
    table = Table('method, images', *(f'{title} GiB' for title in COLUMNS.values()))
    for row in rows:
        table.add_row(*cells(row))
    Console().print(table)


def markdown(rows, crop):
    """The table for a document."""
    lines = [
        f'Predicted by `tools/analysis_tools/memory_table.py` at {crop}x{crop} pixels, in GiB:',
        '',
        f'| method, images | {" | ".join(COLUMNS.values())} |',
        f'|---{"|---" * len(COLUMNS)}|',
        *(f'| {" | ".join(cells(row))} |' for row in rows),
    ]
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    main()
