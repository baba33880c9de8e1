"""Predict with several adapters on one frozen backbone, each with its own heads.

    python tools/serve.py --adapter coco=COCO.py:coco.safetensors \\
        --adapter digits=DIGITS.py:work_dirs/digits/epoch_12.pth --out seen IMAGES...

An adapter is a whole config of mmdet, mmseg or mmrotate, heads and classes included, and what
training with it saved: a checkpoint, or a file of ``mmpeft.save_adapter``. All models are held at
once and share the memory of the frozen backbone. Each writes its predictions and drawn pictures
to OUT/<name>, by its package's own inferencer.
"""

import argparse
import copy
import json
from pathlib import Path

import torch
from merge import load_adapted
from mmengine.registry import DATASETS, init_default_scope

import mmpeft
from mmpeft.engine.config import read_config
from mmpeft.engine.launch import check_checkpoint, run
from mmpeft.engine.packages import import_task
from mmpeft.errors import MissingFileError, UsageError, near

PICTURES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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


def adapters_of(texts):
    """The adapters that were asked for.

    Args:
        texts (list[str]): Of the form NAME=CONFIG:FILE.

    Returns:
        dict[str, tuple[Path, str]]: Config and file by name.

    Raises:
        UsageError: One is of another form, or a name comes twice.
    """
    found = {}
    for text in texts:
        name, _, files = text.partition('=')
        config, _, file = files.partition(':')
        if not (name and config and file) or Path(name).name != name:
            raise UsageError(
                f'--adapter {text}: write NAME=CONFIG:FILE, such as '
                'coco=configs/flora/convnext_coco.py:coco.safetensors.'
            )
        if name in found:
            raise UsageError(f'--adapter: the name {name!r} comes twice. Give each its own.')
        found[name] = Path(config), file
    return found


def pictures_of(paths):
    """The pictures among files and folders.

    Raises:
        MissingFileError: A path does not exist, or a folder holds none.
        UsageError: Two would be written under one name.
    """
    pictures = []
    for path in paths:
        inside = sorted(p for p in path.glob('*') if p.suffix.lower() in PICTURES)
        if not path.exists() or (path.is_dir() and not inside):
            raise MissingFileError(f'there are no pictures at {str(path)!r}.')
        pictures += inside if path.is_dir() else [path]
    by_stem = {}
    for picture in pictures:
        other = by_stem.setdefault(picture.stem, picture)
        if other != picture:
            raise UsageError(
                f'{other} and {picture} would be written under one name. Run them apart, each '
                'with an --out of its own.'
            )
    return [str(picture) for picture in by_stem.values()]


def load(config, file):
    """Build the model of a config with an adapter on it.

    Args:
        config (Path): Of the whole model.
        file (str): A checkpoint, or a file of ``mmpeft.save_adapter``.

    Returns:
        tuple[Config, nn.Module]: The model in evaluation mode.

    Raises:
        UsageError: The config has no adapters, or the file does not fit it.
    """
    cfg = read_config(config)
    check_checkpoint(file)
    if 'peft' not in cfg.get('default_hooks', {}):
        raise UsageError(
            f'{config} has no default_hooks.peft, so there is no frozen backbone to share. Give '
            'the config that the adapter was trained with.'
        )
    import_task(cfg)
    cfg.log_level = 'WARNING'
    if file.endswith('.safetensors'):
        model = mmpeft.load_adapter(load_adapted(cfg, None), file)
    else:
        model = load_adapted(cfg, file)
    return cfg, model.eval()


def load_all(adapters, device):
    """Load adapters one after another and let them share their frozen backbone.

    Args:
        adapters (dict): As from :func:`adapters_of`.
        device (str): Where they go.

    Returns:
        tuple[dict, int]: Config and model by name, and the bytes that are shared.

    Raises:
        UsageError: One does not fit, or their backbones differ.
    """
    loaded, shared = {}, 0
    for name, (config, file) in adapters.items():
        cfg, model = load(config, file)
        loaded[name] = cfg, model.to(device)
        shared += mmpeft.share_base({n: m for n, (_, m) in loaded.items()})
    return loaded, shared


def inferencer(cfg, model, device):
    """The inferencer of a config's package, on a model that is there already.

    Returns:
        mmengine.infer.BaseInferencer: Its ``model.dataset_meta`` is the
            config's.
    """
    if cfg.default_scope == 'mmseg':
        from mmseg.apis import MMSegInferencer as Inferencer
    else:
        from mmdet.apis import DetInferencer as Inferencer
    init_default_scope(cfg.default_scope)
    dataset = copy.deepcopy(cfg.test_dataloader.dataset)
    dataset.lazy_init = True
    known = DATASETS.build(dataset).metainfo
    model.dataset_meta = dict(classes=known['classes'], palette=known.get('palette', 'random'))
    model.cfg = cfg

    class Ready(Inferencer):
        def _init_model(self, *_):
            return model

    return Ready(cfg, device=device, scope=cfg.default_scope, show_progress=False)


def predict(cfg, model, pictures, folder, args):
    """Write predictions and drawn pictures of one model into a folder."""
    tool = inferencer(cfg, model, args.device)
    segments = cfg.default_scope == 'mmseg'
    options = {} if segments else dict(pred_score_thr=args.score_thr, no_save_pred=False)
    tool(pictures, batch_size=args.batch_size, out_dir=str(folder), **options)
    classes = list(model.dataset_meta['classes'])
    (folder / 'classes.json').write_text(json.dumps(classes, indent=1, ensure_ascii=False))


def main():
    args = parse_args()
    adapters = adapters_of(args.adapter)
    chosen = args.use or list(adapters)
    for name in chosen:
        if name not in adapters:
            raise UsageError(f'--use: there is no adapter {name!r}. {near(name, adapters)}')
    pictures = pictures_of(args.images)
    folders = {name: args.out / name for name in chosen}
    taken = [str(folder) for folder in folders.values() if folder.exists()]
    if taken and not args.overwrite:
        raise UsageError(f'{" and ".join(taken)} exist already. Name another OUT, or --overwrite.')
    loaded, shared = load_all(adapters, args.device)
    for name, folder in folders.items():
        predict(*loaded[name], pictures, folder, args)
        print(f'{len(pictures)} pictures by {name}: {folder}')
    print(f'{len(loaded)} models share {shared / 2**20:.1f} MiB of frozen weights.')


if __name__ == '__main__':
    run(main)
