"""Predictions and drawn pictures of loaded models, by their packages' inferencers."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mmengine.registry import init_default_scope
from torch import nn

from mmpeft.errors import MissingFileError, UsageError
from mmpeft.serving.shared_base import share_base

from .inference import init_model

PICTURES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')


def load_on_one_base(
    adapters: Mapping[str, tuple[str, str]], device: str = 'cpu'
) -> tuple[dict[str, nn.Module], int]:
    """Load models that share their frozen backbone.

    Args:
        adapters: Config and checkpoint, or adapter file, by name.
        device: Where the models go.

    Returns:
        The models by name, and the bytes that are shared.

    Raises:
        UsageError: One does not fit or has no adapters, or their backbones
            differ.
    """
    models, shared = {}, 0
    for name, (config, file) in adapters.items():
        models[name] = init_model(config, file, device)
        if not getattr(models[name], 'peft', []):
            raise UsageError(f'{name}: {file} holds no adapters, so there is no base to share.')
        shared += share_base(models)
    return models, shared


def pictures_in(paths: Iterable[Path]) -> list[str]:
    """The pictures among files and folders.

    Raises:
        UsageError: A path does not exist, a folder holds none, or the
            predictions of two would be written under one name.
    """
    by_stem = {}
    for path in paths:
        inside = sorted(p for p in path.glob('*') if p.suffix.lower() in PICTURES)
        if not path.exists() or (path.is_dir() and not inside):
            raise MissingFileError(f'there are no pictures at {str(path)!r}.')
        for picture in inside if path.is_dir() else [path]:
            other = by_stem.setdefault(picture.stem, picture)
            if other != picture:
                raise UsageError(
                    f'{other} and {picture} would be written under one name. Run them apart, each '
                    'with an --out of its own.'
                )
    return [str(picture) for picture in by_stem.values()]


def predict(
    model: nn.Module,
    pictures: Sequence[str],
    folder: Path,
    batch_size: int = 1,
    score_thr: float = 0.3,
) -> None:
    """Write predictions, drawn pictures and ``classes.json`` into a folder.

    Args:
        model: From :func:`~mmpeft.engine.inference.init_model`.
        pictures: Files.
        folder: Takes what is written.
        batch_size: Pictures at once.
        score_thr: The lowest score of boxes that are drawn.
    """
    init_default_scope(model.cfg.default_scope)
    folder.mkdir(parents=True, exist_ok=True)
    if model.cfg.default_scope == 'mmpretrain':
        _classify(model, pictures, folder, batch_size)
    else:
        _infer(model, pictures, folder, batch_size, score_thr)
    classes = list(model.dataset_meta['classes'])
    (folder / 'classes.json').write_text(json.dumps(classes, indent=1, ensure_ascii=False))


def _infer(model, pictures, folder, batch_size, score_thr):
    scope = model.cfg.default_scope
    if scope == 'mmseg':
        from mmseg.apis import MMSegInferencer as Inferencer

        options = {}
    else:
        from mmdet.apis import DetInferencer as Inferencer

        options = dict(pred_score_thr=score_thr, no_save_pred=False)

    class Ready(Inferencer):
        def _init_model(self, *_):
            return model

    device = str(next(model.parameters()).device)
    tool = Ready(model.cfg, device=device, scope=scope, show_progress=False)
    tool(list(pictures), batch_size=batch_size, out_dir=str(folder), **options)


def _classify(model, pictures, folder, batch_size):
    from mmpretrain import ImageClassificationInferencer

    tool = ImageClassificationInferencer(model)
    found = tool(list(pictures), batch_size=batch_size, show_dir=str(folder / 'vis'))
    (folder / 'preds').mkdir(exist_ok=True)
    for picture, prediction in zip(pictures, found, strict=True):
        prediction['pred_scores'] = prediction['pred_scores'].tolist()
        text = json.dumps(prediction, ensure_ascii=False)
        (folder / 'preds' / f'{Path(picture).stem}.json').write_text(text)
