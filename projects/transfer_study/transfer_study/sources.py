"""Images to pretrain on: an endless stream, drawn from what is not a task's."""

from collections.abc import Callable

import cv2
import material
import numpy as np
import skimage.data
import torch
from photo_scenes import Photos, read_cutout
from scenes import draw_scene, to_uint8
from skimage.color import gray2rgb
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.utils.data import Dataset

from .stamps import BACKGROUNDS, CUTOUTS, backgrounds, checked_folder, shrunk

# Pictures that scikit-image is installed with.
PICTURES = (
    'astronaut',
    'brick',
    'camera',
    'cell',
    'chelsea',
    'clock',
    'coffee',
    'coins',
    'grass',
    'gravel',
    'hubble_deep_field',
    'immunohistochemistry',
    'moon',
    'page',
    'retina',
    'rocket',
    'text',
)
LENGTH = (0.4, 0.95)  # of a cut-out, in sides of the image
Draw = Callable[[np.random.Generator, int], np.ndarray]


def stamps() -> Draw:
    """One or two cut-outs of any kind on a photograph, RGB from 0 to 1."""
    pictures = [read_cutout(file) for file in sorted(checked_folder(*CUTOUTS).rglob('*.png'))]
    photographs = backgrounds(checked_folder(*BACKGROUNDS))
    source = Photos([[p for p in pictures if p is not None]], photographs)

    def draw(rng, size):
        length = [size * x for x in LENGTH]
        return draw_scene(rng, source, size, count=(1, 2), length=length).image / 255

    return draw


def photographs() -> Draw:
    """A part of a photograph, of MATE's or of those of scikit-image and scikit-learn."""
    pictures = [getattr(skimage.data, name)() for name in PICTURES] + load_sample_images().images
    coloured = [x if x.ndim == 3 else gray2rgb(x) for x in pictures]
    nature = backgrounds(checked_folder(*BACKGROUNDS))
    return Photos([], nature + [shrunk(picture) for picture in coloured]).background


def fashion_mnist() -> Draw:
    """An image of Fashion-MNIST's training set, in gray."""
    images, _ = material.fashion_mnist('train')

    def draw(rng, size):
        image = images[rng.integers(len(images))][:, :: rng.choice([1, -1])]
        image = cv2.resize(np.ascontiguousarray(image), (size, size)) / 255
        return np.repeat(image[..., None], 3, 2)

    return draw


SOURCES = dict(stamps=stamps, photographs=photographs, fashion_mnist=fashion_mnist)


class Stream(Dataset):
    """Images of several sources, each as often as another; an image's number decides it.

    Args:
        sources: Draw an image from a random generator and a side in pixels.
        number: Images.
        size: Side of the images, pixels.
        mean, std: Of pixels from 0 to 255, which images are prepared by.
    """

    def __init__(self, sources: list[Draw], number: int, size: int, mean: float, std: float):
        self.sources, self.number, self.size = sources, number, size
        self.mean, self.std = mean, std

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> Tensor:
        """An image of another brightness and tint, float32 (3, size, size)."""
        rng = np.random.default_rng(index)
        image = self.sources[rng.integers(len(self.sources))](rng, self.size)
        image = to_uint8(np.clip(image * rng.uniform(0.6, 1.4, 3), 0, 1))
        return (torch.from_numpy(image).movedim(2, 0).float() - self.mean) / self.std
