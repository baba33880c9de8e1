"""Fold the adapters of a checkpoint into the weights that they adapt.

    python tools/merge.py CONFIG CHECKPOINT OUT.pth

writes a plain checkpoint, with the names of the model without adapters, and
beside it OUT.py, the config without the adapters' hook. mmdet's, mmseg's and
mmrotate's own tools and inferencers take the two. A timm backbone is still
mmpeft's; with ``--backbone mmpretrain`` a ConvNeXt becomes mmpretrain's, and
nothing of mmpeft is left. CHECKPOINT can be an adapter file, too.

``--check`` builds the model that OUT.py and OUT.pth will give, runs a batch
through it and through the adapted model, and prints how much maps and
predictions differ. Above a bound it ends with an error and writes nothing.
"""

from pathlib import Path

import mmpeft
from mmpeft.analysis.comparison import default_bound, observe, table
from mmpeft.checkpoint.atomic import refuse_existing
from mmpeft.engine.command_line import add_arguments, parser_of, run
from mmpeft.engine.inference import init_model, read_saved
from mmpeft.engine.launch import check_checkpoint, load_config
from mmpeft.engine.merging import compare_merged, merged, write_merged
from mmpeft.engine.trial_images import trial_batch
from mmpeft.errors import UsageError


def parse_args():
    parser = parser_of(__doc__)
    add_arguments(parser)
    parser.add_argument('checkpoint', help='checkpoint with adapters, or adapter file')
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
        help='largest relative difference of maps; 1e-5 in float32, 5e-2 with weights in bfloat16',
    )
    parser.add_argument(
        '--write-failed', action='store_true', help='write OUT even if the check fails'
    )
    return parser.parse_args()


def main():
    args = parse_args()
    cfg = load_config(args)
    if args.out.suffix not in ('.pth', '.pt'):
        raise UsageError(f'{args.out}: name a file that ends in .pth.')
    check_checkpoint(args.checkpoint)
    if not args.overwrite:
        refuse_existing(args.out, args.out.with_suffix('.py'))
    checks = args.check or args.check_images or args.bound is not None
    if checks:
        batch, words = trial_batch(cfg, args.check_images)
    model = init_model(cfg, args.checkpoint)
    if not getattr(model, 'peft', []):
        raise UsageError(f'{args.checkpoint} holds no adapters, so there is nothing to merge.')
    adapters = mmpeft.summary(model).adapters
    if checks:
        before = observe(model, batch)
        bound = default_bound(model) if args.bound is None else args.bound
    plain, state = merged(model, cfg, args.backbone)
    if checks:
        found = compare_merged(before, plain, state, batch)
        print(f'merged against adapted on {words}\n{table(found, bound)}')
        failed = [row.name for row in found if row.exceeds(bound)]
        if failed and not args.write_failed:
            raise UsageError(
                f'merging changes what the model computes: {", ".join(failed)} differ by more '
                'than the bound. Nothing was written. Give a larger --bound if such differences '
                'do no harm, or --write-failed to write anyway.'
            )
    meta = read_saved(args.checkpoint).content.get('meta')
    config_out = write_merged(args.out, plain, state, meta)
    size = args.out.stat().st_size / 2**20
    print(f'merged {adapters:,} adapter parameters: {args.out} ({size:.1f} MiB), {config_out}')


if __name__ == '__main__':
    run(main)
