"""One process of sharded runs: ``shard_run.py FOLDER [FROM]``, under torchrun or not.

Each of METHODS trains in FOLDER/NAME. Each of RESUMED goes on from FROM/NAME/epoch_1.pth, which is
FOLDER's own if there is no FROM, and saves again before it does. VICTIM is the rank that is killed
while the second checkpoint is saved.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from mmengine.registry import MODELS
from torch import nn

import mmpeft
from mmpeft.checkpoint import atomic
from mmpeft.engine.hooks import shard_hook
from mmpeft.engine.launch import build_runner
from mmpeft.errors import UsageError
from tests.toy import ToyBackbone, ToyBlock, scores, toy_config

RANKS, VICTIM = int(os.environ.get('WORLD_SIZE', 0)), os.environ.get('VICTIM')
RESUMED = 'lora', 'full', 'adalora'
METHODS = dict(
    lora=dict(type='LoRA', rank=2),
    lotr=dict(type='LoTR', rank=2),
    adaptformer=dict(type='AdaptFormer', rank=2),
    full=dict(type='Full'),
    adalora=dict(type='AdaLoRA', rank=1, warmup=1, settle=2, every=1),
    diff_pruning=dict(type='DiffPruning', project_at=3, sample=False),
)


@MODELS.register_module()
class BlocksBackbone(ToyBackbone):
    def __init__(self, **arguments):
        super().__init__(norm=False, dropout=0.0, **arguments)
        self.block = nn.Sequential(ToyBlock(12), ToyBlock(12))


def config(folder, method, **changes):
    ranked = dict(launcher='pytorch') | {'default_hooks.peft.shard': True} if RANKS else {}
    return toy_config(
        folder,
        method,
        **{
            'experiment_name': str(folder),
            'model.backbone.type': 'BlocksBackbone',
            'train_dataloader.batch_size': 4 // max(RANKS, 1),
            'train_dataloader.dataset.noise': 0.0,
            'optim_wrapper.clip_grad': dict(max_norm=0.1),
            'default_hooks.peft.memory': 'small',
        }
        | ranked
        | changes,
    )


def train(folder, name, **changes):
    runner = build_runner(config(folder / name, METHODS[name], **changes))
    if VICTIM == str(runner.rank):
        kill_at_the_second(runner)
    runner.train()
    return runner


def trained(folder, name):
    """What a rank predicts after two epochs, and how many elements it holds of what is sharded."""
    runner = train(folder, name, **{'train_cfg.max_epochs': 2})
    if RANKS:
        mmpeft.save_adapter(runner.model, folder / name / 'by_all.safetensors')
    held = [p.to_local().numel() for p in sharded(runner)]
    return dict(scores=scores(runner.val()).tolist(), held=held, frozen=frozen_in_blocks(runner))


def resume(folder, name, source):
    """Load the first checkpoint and save it again, then train the second epoch."""
    loaded = dict(resume=True, load_from=f'{source}/{name}/epoch_1.pth')
    runner = train(folder / 'again', name, **loaded | {'train_cfg.max_epochs': 1})
    meta = dict(epoch=1, iter=runner.iter)
    runner.save_checkpoint(str(folder / 'again' / name), 'epoch_1.pth', meta=meta)
    train(folder / 'resumed', name, **loaded | {'train_cfg.max_epochs': 2})


def sharded(runner):
    return [p for p in runner.model.parameters() if hasattr(p, 'to_local')]


def frozen_in_blocks(runner):
    named = runner.model.named_parameters()
    return sum(p.numel() for name, p in named if '.block.' in name and not p.requires_grad)


def kill_at_the_second(runner):
    """Rank 0 while it writes; another before it gives its parts."""
    module, name = (shard_hook, 'whole') if runner.rank else (atomic, '_flush')
    original = getattr(module, name)

    def call(*args):
        if runner.epoch == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)

    setattr(module, name, call)


def refused(folder, name, method=METHODS['lora'], **changes):
    """By what sentence a run is refused at its start."""
    try:
        build_runner(config(folder / name, method, **changes)).train()
    except UsageError as error:
        return str(error)
    return None


def refusals(folder):
    return dict(
        bits=refused(folder, 'bits', **{'default_hooks.peft.frozen_dtype': 'int8'}),
        averages=refused(folder, 'averages', custom_hooks=[dict(type='EMAHook')]),
        compile=refused(folder, 'compile', compile=True),
        blocks=refused(folder, 'blocks', **{'model.backbone.type': 'ToyBackbone'}),
    )


def main(folder, source=None):
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    folder, found = Path(folder), {}
    if source is None or not RANKS:
        found = {name: trained(folder, name) for name in (['full'] if VICTIM else METHODS)}
    for name in RESUMED:
        resume(folder, name, source or folder)
    if RANKS == 2:
        found['refusals'] = refusals(folder)
    rank = os.environ.get('RANK', 0)
    (folder / f'rank{rank}.json').write_text(json.dumps(found))


if __name__ == '__main__':
    main(*sys.argv[1:])
