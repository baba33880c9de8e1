"""Predict with several adapters on one frozen backbone, each with its own heads.

    python tools/serve.py --adapter coco=COCO.py:coco.safetensors \\
        --adapter digits=DIGITS.py:work_dirs/digits/epoch_12.pth --out seen IMAGES...

An adapter is a whole config of mmdet, mmseg, mmrotate or mmpretrain, heads and classes included,
and what training with it saved: a checkpoint, or a file of ``mmpeft.save_adapter``. All models are
held at once and share the memory of the frozen backbone. Each writes its predictions and drawn
pictures to OUT/<name>, by its package's own inferencer.
"""

from pathlib import Path

import torch

from mmpeft.checkpoint.atomic import refuse_existing
from mmpeft.engine.command_line import parser_of, run
from mmpeft.engine.prediction import load_on_one_base, pictures_in, predict
from mmpeft.errors import UsageError, suggest


def parse_args():
    parser = parser_of(__doc__)
    parser.add_argument('images', nargs='+', type=Path, help='pictures, or folders of them')
    parser.add_argument(
        '--adapter',
        action='append',
        required=True,
        metavar='NAME=CONFIG:FILE',
        help='its config and its checkpoint or adapter file; once for each adapter',
    )
    parser.add_argument('--use', nargs='+', metavar='NAME', help='adapters to run; all if left out')
    parser.add_argument('--out', type=Path, required=True, help='folder for what is predicted')
    parser.add_argument('--overwrite', action='store_true', help='write into OUT/<name> that exist')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--batch-size', type=int, default=1)
    parser.add_argument(
        '--score-thr', type=float, default=0.3, help='lowest score of what is drawn'
    )
    return parser.parse_args()


def adapters_of(texts: list[str]) -> dict[str, tuple[str, str]]:
    """Config and file by name, from texts of the form NAME=CONFIG:FILE.

    Raises:
        UsageError: One is of another form, or a name comes twice.
    """
    found = {}
    for text in texts:
        name, _, files = text.partition('=')
        config, _, file = files.rpartition(':')
        if not (name and config and file) or Path(name).name != name:
            raise UsageError(
                f'--adapter {text}: write NAME=CONFIG:FILE, such as '
                'coco=configs/flora/convnext_coco.py:coco.safetensors.'
            )
        if name in found:
            raise UsageError(f'--adapter: the name {name!r} comes twice. Give each its own.')
        found[name] = config, file
    return found


def main():
    args = parse_args()
    adapters = adapters_of(args.adapter)
    chosen = args.use or list(adapters)
    for name in chosen:
        if name not in adapters:
            raise UsageError(f'--use: there is no adapter {name!r}. {suggest(name, adapters)}')
    pictures = pictures_in(args.images)
    folders = {name: args.out / name for name in chosen}
    if not args.overwrite:
        refuse_existing(*folders.values())
    models, shared = load_on_one_base(adapters, args.device)
    for name, folder in folders.items():
        predict(models[name], pictures, folder, args.batch_size, args.score_thr)
        print(f'{len(pictures)} pictures by {name}: {folder}')
    print(f'{len(models)} models share {shared / 2**20:.1f} MiB of frozen weights.')


if __name__ == '__main__':
    run(main)
