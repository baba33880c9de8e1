"""Tiles of aerial photographs with their trees, in COCO's format. No photograph is in two parts.

While rates are tuned, the largest photograph trains (574 trees) and the two smallest are held out
(98 trees); then these three train, and the fourth is the test (279 trees). It is of the largest
one's region, 13 km away.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scene_files import write_image
from tree_crowns import BIG, OSBS, SOAP, TEST, tree_crowns

from .trial import Trial

PARTS = dict(
    tune=dict(train=(BIG,), val=(OSBS, SOAP)), final=dict(train=(BIG, OSBS, SOAP), val=(TEST,))
)
SEEN = 0.5  # a tree of which less is in a tile is neither to be found nor background there


def grid(shape: tuple[int, int], size: int) -> Iterator[tuple[int, int]]:
    """Corners (y, x) of tiles side by side; what remains at the right and below is left out."""
    for y in range(0, shape[0] - size + 1, size):
        for x in range(0, shape[1] - size + 1, size):
            yield y, x


def cut(boxes: np.ndarray, y: int, x: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The parts of boxes (N, 4) that a tile shows, in its pixels, and which fraction that is."""
    inside = np.clip(boxes - [x, y, x, y], 0, size)
    area = np.prod(inside[:, 2:] - inside[:, :2], axis=1)
    shown = area > 0
    whole = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    return inside[shown], (area / whole)[shown]


def write_tiles(trial: Trial, root: Path, numbers: dict[str, int]) -> None:
    """Write ``coco/train``, so many tiles at random places, and ``coco/val``, all side by side."""
    rng = np.random.default_rng(trial.seed)
    for part, names in PARTS[trial.stage].items():
        images, annotations = [], []
        photographs = [tree_crowns(name) for name in names]
        areas = np.array([picture[..., 0].size for picture, _ in photographs])
        if part == 'train':
            chosen = rng.choice(len(names), numbers['train'], p=areas / areas.sum())
            limits = [np.array(photographs[i][0].shape[:2]) - trial.size + 1 for i in chosen]
            corners = [(i, *rng.integers(n)) for i, n in zip(chosen, limits, strict=True)]
        else:
            shapes = [picture.shape[:2] for picture, _ in photographs]
            corners = [(i, *c) for i, s in enumerate(shapes) for c in grid(s, trial.size)]
        for number, (i, y, x) in enumerate(corners):
            picture, boxes = photographs[i]
            name = f'{number:05d}.png'
            tile = picture[y : y + trial.size, x : x + trial.size]
            write_image(root / 'coco' / part / name, tile)
            images.append(dict(id=number, file_name=name, height=trial.size, width=trial.size))
            for (x1, y1, x2, y2), seen in zip(*cut(boxes, y, x, trial.size), strict=True):
                annotations.append(
                    dict(
                        id=len(annotations) + 1,
                        image_id=number,
                        category_id=1,
                        bbox=[x1, y1, x2 - x1, y2 - y1],
                        area=(x2 - x1) * (y2 - y1),
                        iscrowd=int(seen < SEEN),
                    )
                )
        categories = [dict(id=1, name='tree')]
        coco = dict(images=images, annotations=annotations, categories=categories)
        path = root / 'coco' / 'annotations' / f'instances_{part}.json'
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(coco))
