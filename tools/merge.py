"""Fold the adapters of a checkpoint into the weights that they adapt.

    python tools/merge.py CONFIG CHECKPOINT OUT.pth

writes a plain checkpoint, with the names of the model without adapters, and
beside it OUT.py, the config without the adapters' hook. mmdet's, mmseg's and
mmrotate's own tools and inferencers take the two. A timm backbone is still
mmpeft's; with ``--backbone mmpretrain`` a ConvNeXt becomes mmpretrain's, and
nothing of mmpeft is left.

``--check`` builds the model that OUT.py and OUT.pth will give, runs a batch
through it and through the adapted model, and prints how much maps and
predictions differ. Above a bound it ends with an error and writes nothing.
"""

import argparse
import copy
import tempfile
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import Runner

import mmpeft
from mmpeft.analysis.comparison import default_bound, differences, observe, table
from mmpeft.checkpoint.atomic import replacing
from mmpeft.engine.hooks.resume import fetch_checkpoint
from mmpeft.engine.launch import add_arguments, check_checkpoint, load_config, run
from mmpeft.engine.trial_images import trial_batch
from mmpeft.errors import UsageError
from mmpeft.interop.mmpretrain import mmpretrain_convnext

MODEL_ONLY = ('model', 'default_scope', 'env_cfg', 'default_hooks', 'log_level', 'randomness')


def parse_args():
    parser = argparse.ArgumentParser(description='Merge adapters into a plain checkpoint')
    parser.add_argument('config', help='config that the checkpoint was trained with')
    parser.add_argument('checkpoint', help='checkpoint with adapters')
    parser.add_argument('out', type=Path, help='plain checkpoint to write, OUT.pth')
    parser.add_argument(
        '--backbone',
        choices=['timm', 'mmpretrain'],
        default='timm',
        help='whose class a ConvNeXt of timm is to be',
    )
    parser.add_argument('--overwrite', action='store_true', help='replace OUT if it exists')
    parser.add_argument(
        '--check', action='store_true', help='compare outputs before and after on a batch'
    )
    parser.add_argument(
        '--check-images',
        nargs='+',
        default=(),
        metavar='IMAGE',
        help='files to check with; the first of the test data, or noise where that is not there',
    )
    parser.add_argument(
        '--bound',
        type=float,
        help='largest relative difference; 1e-4 in float32, 5e-2 where weights are bfloat16',
    )
    parser.add_argument(
        '--write-failed', action='store_true', help='write OUT even if the check fails'
    )
    add_arguments(parser)
    return parser.parse_args()


def load_adapted(cfg, checkpoint):
    """Build the model of a config, adapt it and load a checkpoint, as a test run does."""
    parts = Config({key: cfg[key] for key in MODEL_ONLY if key in cfg})
    parts.load_from = None if checkpoint is None else str(checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        parts.work_dir = folder
        parts.experiment_name = Path(folder).name  # or mmengine takes a second run for the first
        runner = Runner.from_cfg(parts)
        runner.call_hook('before_run')
        runner.load_or_resume()
    return runner.model


def plain_config(cfg):
    """The config of the model without adapters; nothing is fetched to build it."""
    plain = Config(cfg.to_dict(), filename=cfg.filename)
    for name, hook in cfg.default_hooks.items():
        if _is_ours(hook):
            plain.default_hooks.pop(name)
    if 'custom_hooks' in cfg:
        plain.custom_hooks = [hook for hook in plain.custom_hooks if not _is_ours(hook)]
    for key in ('peft', 'load_from', 'resume', 'launcher', 'work_dir'):
        plain.pop(key, None)
    backbone = plain.model.get('backbone', {})
    if backbone.get('type') == 'mmpeft.TimmBackbone':
        backbone.update(pretrained=False, checkpoint=None)
    return plain


def check(before, plain, state, batch, bound):
    """Compare the model that a config and state dict give with what was observed before.

    Args:
        before (dict): Of the adapted model, by :func:`mmpeft.analysis.comparison.observe`.
        plain (Config): Of the merged model.
        state (dict): Of the merged model.
        batch (dict): That ``before`` is of.
        bound (float): Of the relative difference.

    Returns:
        list[str]: Names of the outputs that differ by more.
    """
    model = MODELS.build(copy.deepcopy(plain.model))  # DETR's kin change what they are built from
    model.load_state_dict(state)
    model.to(next(iter(state.values())).device)
    found = differences(observe(model, batch), before)
    print(table(found, bound))
    return [row.name for row in found if row.exceeds(bound)]


def _is_ours(hook):
    return str((hook or {}).get('type')).startswith('mmpeft.')


def main():
    args = parse_args()
    cfg = load_config(args)
    check_checkpoint(args.checkpoint)
    if 'peft' not in cfg.get('default_hooks', {}):
        raise UsageError(
            f'{args.config} has no default_hooks.peft, so there are no adapters to merge. Give '
            'the config that the checkpoint was trained with.'
        )
    config_out = args.out.with_suffix('.py')
    taken = [str(path) for path in (args.out, config_out) if path.exists()]
    if taken and not args.overwrite:
        raise UsageError(f'{" and ".join(taken)} exist already. Name another OUT, or --overwrite.')
    checks = args.check or args.check_images or args.bound is not None
    if checks:
        batch, words = trial_batch(cfg, args.check_images)
    model = load_adapted(cfg, args.checkpoint)
    adapters = mmpeft.summary(model).adapters
    if checks:
        before = observe(model, batch)
        bound = default_bound(model) if args.bound is None else args.bound
    mmpeft.merge(model)
    plain, state = plain_config(cfg), model.state_dict()
    if args.backbone == 'mmpretrain':
        plain.model.backbone, state = mmpretrain_convnext(plain.model.backbone, state)
    if checks:
        print(f'merged against adapted on {words}')
        failed = check(before, plain, state, batch, bound)
        if failed and not args.write_failed:
            raise UsageError(
                f'merging changes what the model computes: {", ".join(failed)} differ by more '
                'than the bound. Nothing was written. Give a larger --bound if such differences '
                'do no harm, or --write-failed to write all the same.'
            )
    meta = dict(fetch_checkpoint(args.checkpoint).get('meta', {}))
    meta.pop('mmpeft', None)
    meta['cfg'] = plain.pretty_text
    with replacing(args.out) as temporary:
        torch.save(dict(meta=meta, state_dict=state), temporary)
    plain.dump(config_out)
    size = args.out.stat().st_size / 2**20
    print(f'merged {adapters:,} adapter parameters: {args.out} ({size:.1f} MiB), {config_out}')


if __name__ == '__main__':
    run(main)
