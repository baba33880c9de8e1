"""Train a model of mmdet, mmseg, mmrotate or mmpretrain by its config.

    python tools/train.py configs/flora/convnext_coco.py
    python tools/train.py configs/frozen/convnext_coco.py --method pissa
    python tools/train.py mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py --method flora

What is adapted, and how, is the config's ``default_hooks.peft``, or ``--method``.
The composed config is written into the work directory, work_dirs/<method>/<config>.
"""

from mmpeft.engine.amp import enable_amp
from mmpeft.engine.command_line import add_arguments, parser_of, run
from mmpeft.engine.launch import (
    build_runner,
    check_checkpoint,
    enable_auto_scale_lr,
    enable_shard,
    load_config,
)
from mmpeft.engine.work_dir import check_work_dir


def parse_args():
    parser = parser_of(__doc__)
    add_arguments(parser)
    parser.add_argument('--amp', action='store_true', help='train in mixed precision')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help="scale the learning rate from the config's batch size to this run's",
    )
    parser.add_argument(
        '--shard',
        action='store_true',
        help='spread the frozen base over the processes; with --method full, everything',
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CKPT',
        help='go on from this checkpoint, or from the latest in the work directory',
    )
    return parser.parse_args()


def main():
    args = parse_args()
    cfg = load_config(args, ('train', 'val'))
    if args.amp:
        enable_amp(cfg)
    if args.auto_scale_lr:
        enable_auto_scale_lr(cfg)
    if args.shard:
        enable_shard(cfg)
    if args.resume:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    if cfg.get('load_from'):
        check_checkpoint(cfg.load_from, cfg)
    check_work_dir(cfg)
    build_runner(cfg, ('train', 'val')).train()


if __name__ == '__main__':
    run(main)
