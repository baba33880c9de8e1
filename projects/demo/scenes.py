"""Scenes: instances with masks over a background, some in front of others."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

SOLID = 0.5  # a pixel belongs to an instance where at least half of it does
RIM = 0.05  # below SOLID and above this the pixel is neither instance nor background
SHOWN = 0.8  # an instance is placed only where each one keeps this fraction of itself in sight
CROWD = 0.3  # and where no two upright boxes overlap by more (intersection over union)


class Sprite(NamedTuple):
    """What is to be painted, and where.

    Attributes:
        label (int): Its class.
        alpha (np.ndarray): Opacity from 0 to 1, float32 (H, W).
        linear (np.ndarray): Its rotation and zoom, (2, 2).
        colour (Callable): From the image below, float32 (H, W, 3), to the
            sprite's colour from 0 to 1, which broadcasts against it.
    """

    label: int
    alpha: np.ndarray
    linear: np.ndarray
    colour: Callable


class Instance(NamedTuple):
    """One sprite of a scene.

    Attributes:
        label (int): Its class.
        mask (np.ndarray): What can be seen of it, bool (H, W).
        corners (np.ndarray): Its rotated rectangle, (4, 2) of x and y in
            pixels, clockwise, around all of it, hidden or not.
        hidden (float): The fraction of it that others cover.
    """

    label: int
    mask: np.ndarray
    corners: np.ndarray
    hidden: float


class Scene(NamedTuple):
    """An image and what is in it.

    Attributes:
        image (np.ndarray): uint8 (H, W, 3), RGB.
        instances (list[Instance]): From the bottom to the top.
        rim (np.ndarray): Pixels in which sprite and background mix, bool (H, W).
    """

    image: np.ndarray
    instances: list
    rim: np.ndarray


def draw_scene(rng, source, size=128, count=(3, 6), **place):
    """Compose a scene.

    Args:
        rng (np.random.Generator): The only source of randomness.
        source: Has ``background(rng, size)``, float32 (size, size, 3) from 0 to
            1, and ``place(rng, size, **place)``, a :class:`Sprite`.
        size (int): Side of the square image in pixels.
        count (tuple[int, int]): Fewest and most sprites to place. Fewer are
            placed when no room is found.

    Returns:
        Scene: The image with its instances.
    """
    image = source.background(rng, size)
    placed, masks = [], []
    for _ in range(rng.integers(count[0], count[1] + 1)):
        for _ in range(20):
            sprite = source.place(rng, size, **place)
            mask = sprite.alpha >= SOLID
            if mask.any() and _has_room(masks, mask):
                break
        else:
            continue
        image += sprite.alpha[..., None] * (sprite.colour(image) - image)
        masks.append(mask)
        placed.append(sprite)
    instances, above, rim = [], np.zeros((size, size), bool), np.zeros((size, size), bool)
    for whole, sprite in zip(masks[::-1], placed[::-1], strict=True):
        mask = whole & ~above
        corners = _rectangle(whole, sprite.linear)
        instances.append(Instance(sprite.label, mask, corners, 1 - mask.sum() / whole.sum()))
        rim |= (sprite.alpha >= RIM) & ~whole & ~above
        above |= whole
    for instance in instances:
        rim &= ~instance.mask
    return Scene(to_uint8(image), instances[::-1], rim)


def turned(degrees):
    """The rotation by an angle, clockwise in a picture, (2, 2)."""
    angle = np.deg2rad(degrees)
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def upright_box(mask):
    """Smallest upright box around a mask: x1, y1, x2, y2 in pixels, the ends outside."""
    y, x = np.nonzero(mask)
    return np.array([x.min(), y.min(), x.max() + 1, y.max() + 1])


def to_uint8(image):
    """Round an image from 0 to 1 to bytes."""
    return np.round(image * 255).astype(np.uint8)


def _has_room(masks, new):
    """Whether ``new`` may come on top of what is there."""
    if any(_box_iou(upright_box(mask), upright_box(new)) > CROWD for mask in masks):
        return False
    above = new
    for mask in masks[::-1]:
        if (mask & ~above).sum() < SHOWN * mask.sum():
            return False
        above = above | mask
    return True


def _box_iou(one, other):
    shared = np.prod(
        np.clip(np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2]), 0, None)
    )
    areas = [np.prod(box[2:] - box[:2]) for box in (one, other)]
    return shared / (sum(areas) - shared)


def _rectangle(mask, linear):
    """Smallest rectangle with the sprite's rotation around its pixels, (4, 2)."""
    axes = linear / np.sqrt(np.linalg.det(linear))
    y, x = np.nonzero(mask)
    own = np.stack([x, y], 1) @ axes
    half = np.abs(axes).sum(0) / 2  # reach of a pixel's corners from its centre
    low, high = own.min(0) - half, own.max(0) + half
    box = np.array([low, [high[0], low[1]], high, [low[0], high[1]]])
    return box @ axes.T + 0.5
