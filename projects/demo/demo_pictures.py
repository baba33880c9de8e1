"""Truth and predictions of several models side by side, as one picture."""

import json
import tempfile
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import pycocotools.mask
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image

from mmpeft.engine.inference import init_model
from mmpeft.engine.prediction import predict

matplotlib.use('agg')
from matplotlib import pyplot  # noqa: E402

LOWEST_SCORE = 0.4
FONT = 6
MARGIN = 0.25  # of a picture's width, the room that a name takes; its height is a third of that


class Seen(NamedTuple):
    """What is in a picture, by its annotation or by a model.

    Attributes:
        labels (list[int]): The instances' classes; of a classifier, one.
        outlines (list[np.ndarray]): Their boxes' corners, (4, 2) of x and y in
            pixels. None for a whole picture.
        masks (list[np.ndarray]): bool (H, W), or empty.
        classes (np.ndarray | None): The class of each pixel, (H, W).
    """

    labels: list
    outlines: list
    masks: list
    classes: np.ndarray | None = None


def draw_sheet(experiments, path, number=6):
    """Draw a row a model, the truth above them, and a column a picture.

    Args:
        experiments (list[Experiment]): Trained.
        path (Path): The PNG file to write.
        number (int): The first pictures of the validation set that are drawn.
    """
    cfg = experiments[0].cfg
    init_default_scope(cfg.default_scope)
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    infos = [dataset.get_data_info(i) for i in range(number)]
    files = [info['img_path'] for info in infos]
    rows = {'truth': [truth_of(info, dataset) for info in infos]}
    for experiment in experiments:
        model = init_model(experiment.config, experiment.checkpoint)
        with tempfile.TemporaryDirectory() as folder:
            predict(model, files, Path(folder))
            rows[experiment.title] = [found_in(Path(folder), Path(file)) for file in files]
    figure, axes = pyplot.subplots(
        len(rows), number, figsize=(1.6 * number, 1.6 * len(rows)), dpi=200, squeeze=False
    )
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(name, fontsize=FONT + 2)
        for axis, file, seen in zip(line, files, pictures, strict=True):
            draw(axis, np.asarray(Image.open(file).convert('RGB')), seen, dataset.metainfo)
    figure.tight_layout(pad=0.3)
    figure.savefig(path)
    pyplot.close(figure)


def truth_of(info, dataset):
    """The annotation of a picture, from its dataset's ``get_data_info``."""
    if info.get('seg_map_path'):
        labels = np.asarray(Image.open(info['seg_map_path'])).astype(int)
        return Seen([], [], [], labels - dataset.reduce_zero_label)
    if 'gt_label' in info:
        return Seen([int(info['gt_label'])], [None], [])
    instances = info['instances']
    return Seen(
        [each['bbox_label'] for each in instances],
        [corners_of(each['bbox']) for each in instances],
        [pycocotools.mask.decode(each['mask']) > 0 for each in instances if 'mask' in each],
    )


def found_in(folder, picture):
    """What :func:`mmpeft.engine.prediction.predict` has written for a picture."""
    maps = folder / 'pred' / f'{picture.stem}_pred.png'
    if maps.exists():
        return Seen([], [], [], np.asarray(Image.open(maps)).astype(int))
    found = json.loads((folder / 'preds' / f'{picture.stem}.json').read_text())
    if 'pred_label' in found:
        return Seen([found['pred_label']], [None], [])
    sure = [i for i, score in enumerate(found['scores']) if score >= LOWEST_SCORE]
    masks = found.get('masks')
    return Seen(
        [found['labels'][i] for i in sure],
        [corners_of(found['bboxes'][i]) for i in sure],
        [pycocotools.mask.decode(masks[i]) > 0 for i in sure] if masks else [],
    )


def corners_of(box):
    """Corners (4, 2) of x1, y1, x2, y2, of an oriented x, y, w, h, radians, or of eight numbers."""
    if len(box) == 4:
        x1, y1, x2, y2 = box
        return np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]])
    if len(box) == 8:
        return np.reshape(box, (4, 2))
    x, y, width, height, angle = box
    half = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * [width / 2, height / 2]
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return half @ turn + [x, y]


def draw(axis, image, seen, meta):
    """Draw one picture: thin outlines, and names below the objects, or above for want of room."""
    colours = np.array(meta.get('palette') or pyplot.get_cmap('tab10').colors)[:, :3]
    colours = colours / 255 if colours.max() > 1 else colours
    axis.imshow(image)
    axis.set(xticks=[], yticks=[], xlim=(-0.5, image.shape[1] - 0.5))
    axis.set_ylim(image.shape[0] - 0.5, -0.5)
    if seen.classes is not None:
        known = (seen.classes >= 0) & (seen.classes < len(colours))
        shown = np.where(known[..., None], colours[np.where(known, seen.classes, 0)], 0)
        axis.imshow(shown, alpha=0.6)
    for mask, label in zip(seen.masks, seen.labels, strict=bool(seen.masks)):
        axis.contour(mask, [0.5], colors=[colours[label]], linewidths=0.7)
    for corners, label in zip(seen.outlines, seen.labels, strict=True):
        name = meta['classes'][label]
        if corners is None:
            axis.set_title(name, fontsize=FONT, pad=2)
            continue
        if not seen.masks:
            axis.fill(*(corners - 0.5).T, fill=False, edgecolor=colours[label], linewidth=0.7)
        (left, top), (right, bottom) = corners.min(0), corners.max(0)
        height, width = image.shape[:2]
        x, side = (left, 'left') if left < (1 - MARGIN) * width else (right, 'right')
        y, edge = (bottom, 'top') if bottom < (1 - MARGIN / 3) * height else (top, 'bottom')
        axis.text(
            *(x - 0.5, y - 0.5), name, fontsize=FONT - 1, color='white',
            ha=side, va=edge, clip_on=True,
            bbox=dict(facecolor=colours[label] / 2, alpha=0.8, linewidth=0, pad=0.4),
        )  # fmt: skip
