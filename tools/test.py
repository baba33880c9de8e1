"""Evaluate a checkpoint of mmdet, mmseg, mmrotate or mmpretrain by its config.

    python tools/test.py configs/flora/convnext_coco.py work_dirs/flora/convnext_coco/epoch_12.pth

The checkpoint may hold adapters alone, everything, or merged weights. Logs go
to the folder ``test`` of the work directory.
"""

from pathlib import Path

from mmpeft.engine.command_line import add_arguments, parser_of, run
from mmpeft.engine.launch import build_runner, check_checkpoint, load_config
from mmpeft.errors import UsageError


def parse_args():
    parser = parser_of(__doc__)
    add_arguments(parser)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--out', help='where predictions go: a .pkl file, for mmseg a folder of label images'
    )
    parser.add_argument('--show', action='store_true', help='show drawn predictions in a window')
    parser.add_argument(
        '--show-dir', help='folder for drawn predictions, within <work-dir>/<timestamp>; all images'
    )
    parser.add_argument('--wait-time', type=float, default=2, help='seconds a picture is shown')
    parser.add_argument('--tta', action='store_true', help='merge predictions over flipped views')
    return parser.parse_args()


def show_predictions(cfg, args):
    """Have the visualization hook draw: in a window, into a folder, or both."""
    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise UsageError(
            f'{cfg.filename} draws nothing: it has no default_hooks.visualization. Add, for mmdet, '
            "default_hooks=dict(visualization=dict(type='mmdet.DetVisualizationHook'))."
        )
    hook.update(dict(enable=True) if cfg.default_scope == 'mmpretrain' else dict(draw=True))
    hook.interval = 1
    if args.show:
        hook.show = True
        hook.wait_time = args.wait_time
    if args.show_dir and cfg.default_scope not in ('mmseg', 'mmpretrain'):
        hook.test_out_dir = args.show_dir


def draw_into(runner, folder):
    """Have a visualizer, which mmseg's and mmpretrain's hooks draw with, write to a folder."""
    for backend in runner.visualizer._vis_backends.values():
        backend._img_save_dir = str(Path(runner.log_dir, folder))


def dump_predictions(runner, cfg, out):
    """Write what is predicted to a file beside the evaluation."""
    if cfg.default_scope == 'mmdet':
        from mmdet.evaluation import DumpDetResults as Dump
    else:
        from mmengine.evaluator import DumpResults as Dump
    runner.test_evaluator.metrics.append(Dump(out_file_path=out))


def main():
    args = parse_args()
    cfg = load_config(args, ('test',))
    check_checkpoint(args.checkpoint, cfg)
    if not args.work_dir and Path(cfg.work_dir).name != 'test':
        cfg.work_dir = f'{cfg.work_dir}/test'  # training's own holds the config of training
    segments = cfg.get('default_scope') == 'mmseg'
    if args.out and not segments and not args.out.endswith(('.pkl', '.pickle')):
        raise UsageError(f'--out {args.out}: name a .pkl or .pickle file.')
    if args.tta and (args.show or args.show_dir) and cfg.get('default_scope') == 'mmpretrain':
        raise UsageError(
            "mmpretrain's hook draws one view of an image, and --tta makes several. Leave out "
            '--tta, or --show and --show-dir.'
        )
    cfg.load_from = args.checkpoint
    if args.show or args.show_dir:
        show_predictions(cfg, args)
    if args.tta:
        from mmpeft.engine.tta import enable_tta

        enable_tta(cfg)
    if args.out and segments:
        cfg.test_evaluator.update(output_dir=args.out, keep_results=True)
    runner = build_runner(cfg, ('test',))
    if args.show_dir and cfg.default_scope in ('mmseg', 'mmpretrain'):
        draw_into(runner, args.show_dir)
    if args.out and not segments:
        dump_predictions(runner, cfg, args.out)
    runner.test()


if __name__ == '__main__':
    run(main)
