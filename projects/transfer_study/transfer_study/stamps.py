"""Photo classes: cut-outs of animals, plants and things on photographs, split by cut-out."""

import re
from functools import cache
from pathlib import Path

import cv2
import material
import numpy as np
import torch
from photo_scenes import PHOTOGRAPHS, STAMPS, Photos, read_classes, read_photographs
from scenes import draw_scene
from torch import Tensor

from .trial import Trial

VIEWS = 4  # of a cut-out, each on another part of a photograph
LENGTH = (0.6, 0.95)  # of a cut-out, in sides of the image
CUTOUTS = (
    STAMPS,
    '.png',
    'a97c32070a372b71aa77e2d20282a2d91f27131c73ceae8bafc05666e8323702',
    'apt-get install tuxpaint-stamps-default  # 2022.06.04, 161 MB, GPL-2',
)
BACKGROUNDS = (
    PHOTOGRAPHS,
    '.jpg',
    'bcc88af3665d091341494eb1a1cf6b171ade9531bb1a196e4d5a7544609002d0',
    'apt-get install mate-backgrounds  # 1.26.0, 47 MB, GPL-2',
)
Classes = dict[str, dict[Path, np.ndarray]]

read_classes, checked_folder = cache(read_classes), cache(material.checked_folder)


@cache
def backgrounds(folder: Path) -> list[np.ndarray]:
    """The photographs of a folder, shrunk."""
    return [shrunk(photograph) for photograph in read_photographs(folder)]


def shrunk(picture: np.ndarray) -> np.ndarray:
    """A picture uint8 (H, W, 3) whose shorter side is at most 256 pixels."""
    zoom = min(256 / min(picture.shape[:2]), 1)
    return cv2.resize(picture, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_AREA)


def stamps(trial: Trial) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images (N, 3, size, size) uint8 and labels (N,) to train on, and those to score.

    Half of the cut-outs are to train, the other half is the test set; two thirds of the first
    half and the rest of it, where settings are tuned. Each seed splits anew.
    """
    classes = read_classes(checked_folder(*CUTOUTS))
    photographs = backgrounds(checked_folder(*BACKGROUNDS))
    rng = np.random.default_rng(trial.seed)
    train, held = split(classes, rng, 1 / 2)
    if trial.stage == 'tune':
        train, held = split(train, rng, 2 / 3)
    return tuple(views(part, photographs, rng, trial.size) for part in (train, held))


def split(classes: Classes, rng: np.random.Generator, share: float) -> tuple[Classes, Classes]:
    """Each class in two parts, the first of which has nearly ``share`` of its cut-outs.

    What may show one subject stays together: cut-outs whose names begin with the same word.
    """
    parts = {}, {}
    for label, pictures in classes.items():
        subjects = {}
        for file in pictures:
            word = re.split(r'[\d_-]', file.stem)[0].lower() or file.stem
            subjects.setdefault(word, []).append(file)
        order = [subjects[word] for word in rng.permutation(list(subjects))]
        counts = np.cumsum([len(files) for files in order[:-1]])
        first = abs(counts - share * len(pictures)).argmin() + 1
        for part, chosen in zip(parts, (order[:first], order[first:]), strict=True):
            part[label] = {file: pictures[file] for files in chosen for file in files}
    return parts


def views(
    classes: Classes, photographs: list[np.ndarray], rng: np.random.Generator, size: int
) -> tuple[Tensor, Tensor]:
    """Images and labels of all cut-outs, each turned and placed at random several times."""
    length = [size * x for x in LENGTH]
    images, labels = [], []
    for label, pictures in enumerate(classes.values()):
        for picture in [*pictures.values()] * VIEWS:
            source = Photos([[picture]], photographs)
            images.append(draw_scene(rng, source, size, count=(1, 1), length=length).image)
            labels.append(label)
    return torch.tensor(np.stack(images)).movedim(-1, 1).contiguous(), torch.tensor(labels)
