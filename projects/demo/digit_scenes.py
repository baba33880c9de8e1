"""Scenes of handwritten digits: scikit-learn's 8x8 scans over drawn backgrounds."""

from typing import NamedTuple

import cv2
import numpy as np
from digit_backgrounds import draw_background
from sklearn.datasets import load_digits

CLASSES = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')
INK = 0.5  # a pixel belongs to a digit where at least half of it is ink
RIM = 0.05  # below INK and above this the pixel is neither digit nor background
SHOWN = 0.8  # a digit is placed only where every digit keeps this fraction of its ink in sight
CROWD = 0.3  # and where no two upright boxes overlap by more (intersection over union)
CONTRAST = (0.35, 0.7)  # of a digit to what is below it, in each of red, green and blue


class Digit(NamedTuple):
    """One digit of a scene.

    Attributes:
        label (int): 0 to 9.
        mask (np.ndarray): What can be seen of it, bool (H, W).
        corners (np.ndarray): Its rotated rectangle, (4, 2) of x and y in
            pixels, clockwise, around all of its ink, hidden or not.
        hidden (float): The fraction of its ink that other digits cover.
    """

    label: int
    mask: np.ndarray
    corners: np.ndarray
    hidden: float


class Scene(NamedTuple):
    """An image and what is in it.

    Attributes:
        image (np.ndarray): uint8 (H, W, 3), RGB.
        digits (list[Digit]): From the bottom to the top.
        rim (np.ndarray): Pixels in which ink and background mix, bool (H, W).
    """

    image: np.ndarray
    digits: list
    rim: np.ndarray


def load_scans():
    """Return the scans as ``{'train': (scans, labels), 'val': ...}``.

    The split is fixed and disjoint: every fifth scan is for validation. Scans
    are float32 (N, 8, 8) from 0 (paper) to 1 (ink).
    """
    data = load_digits()
    scans, labels = data.images.astype(np.float32) / 16, data.target
    is_val = np.arange(len(labels)) % 5 == 4
    return {'train': (scans[~is_val], labels[~is_val]), 'val': (scans[is_val], labels[is_val])}


def draw_scene(rng, scans, labels, size=128, count=(3, 6), height=(28, 52), turn=35):
    """Compose a scene.

    Args:
        rng (np.random.Generator): The only source of randomness.
        scans (np.ndarray): (N, 8, 8), as from :func:`load_scans`.
        labels (np.ndarray): Their classes, (N, ).
        size (int): Side of the square image in pixels.
        count (tuple[int, int]): Fewest and most digits to place. Fewer are
            placed when no room is found.
        height (tuple[float, float]): Range of the digits' height in pixels.
        turn (float): Largest rotation to either side in degrees.

    Returns:
        Scene: The image with its digits.
    """
    image = draw_background(rng, size)
    inks, found = [], []
    for _ in range(rng.integers(count[0], count[1] + 1)):
        for _ in range(20):
            pick = rng.integers(len(labels))
            alpha, affine = _place(rng, scans[pick], size, height, turn)
            ink = alpha >= INK
            if ink.any() and _has_room(inks, ink):
                break
        else:
            continue
        paint(rng, image, alpha)
        inks.append(ink)
        found.append((int(labels[pick]), alpha, _rectangle(ink, affine)))
    digits, rim, above = [], np.zeros((size, size), bool), np.zeros((size, size), bool)
    for ink, (label, alpha, corners) in zip(inks[::-1], found[::-1], strict=True):
        mask = ink & ~above
        digits.append(Digit(label, mask, corners, 1 - mask.sum() / ink.sum()))
        rim |= (alpha >= RIM) & ~ink & ~above
        above |= ink
    for digit in digits:
        rim &= ~digit.mask
    return Scene(to_uint8(image), digits[::-1], rim)


def draw_scan(rng, scan, size=40, height=(26, 40), turn=10):
    """Draw one digit in dark ink on white paper.

    Args:
        rng (np.random.Generator): The only source of randomness.
        scan (np.ndarray): (8, 8), as from :func:`load_scans`.
        size (int): Side of the square image in pixels.
        height (tuple[float, float]): Range of the digit's height in pixels.
        turn (float): Largest rotation to either side in degrees.

    Returns:
        np.ndarray: uint8 (size, size, 3).
    """
    paper = rng.uniform(0.8, 0.95) + rng.normal(0, 0.02, (size, size, 3))
    alpha, _ = _place(rng, scan, size, height, turn)
    alpha = alpha[..., None] * rng.uniform(0.6, 1)
    return to_uint8(np.clip(paper * (1 - alpha), 0, 1))


def paint(rng, image, alpha):
    """Paint a digit, float32 (H, W) of opacity, in a colour that contrasts with the image below."""
    below = image[alpha >= INK].mean(0)
    contrast = rng.uniform(*CONTRAST, 3)
    brighter = below.mean() < rng.uniform(0.4, 0.6)
    colour = np.clip(below + contrast if brighter else below - contrast, 0, 1)
    image += alpha[..., None] * (colour.astype(np.float32) - image)


def upright_box(mask):
    """Smallest upright box around a mask: x1, y1, x2, y2 in pixels, the ends outside."""
    y, x = np.nonzero(mask)
    return np.array([x.min(), y.min(), x.max() + 1, y.max() + 1])


def to_uint8(image):
    """Round an image from 0 to 1 to bytes."""
    return np.round(image * 255).astype(np.uint8)


def _place(rng, scan, size, height, turn):
    """Draw a scan somewhere.

    Returns:
        Opacity of its ink, float32 (size, size) from 0 to 1, with edges that
        are one or two pixels wide at any scale; and the map from the scan's
        pixels to the picture's, (2, 3).
    """
    tall = rng.uniform(*height)
    centre = rng.uniform(tall / 2, size - tall / 2, 2)
    angle = np.deg2rad(rng.uniform(-turn, turn))
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = tall / 8 * rotation
    shift = centre - linear @ np.array([3.5, 3.5])
    affine = np.concatenate([linear, shift[:, None]], 1)
    grey = cv2.warpAffine(scan, affine, (size, size), flags=cv2.INTER_CUBIC)
    zoom = np.sqrt(abs(np.linalg.det(linear)))
    return np.clip((grey - INK) * zoom / 2 + INK, 0, 1), affine


def _has_room(inks, new):
    """Whether ``new`` may come on top of what is there."""
    if any(_box_iou(upright_box(ink), upright_box(new)) > CROWD for ink in inks):
        return False
    above = new
    for ink in inks[::-1]:
        if (ink & ~above).sum() < SHOWN * ink.sum():
            return False
        above = above | ink
    return True


def _box_iou(one, other):
    shared = np.prod(
        np.clip(np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2]), 0, None)
    )
    areas = [np.prod(box[2:] - box[:2]) for box in (one, other)]
    return shared / (sum(areas) - shared)


def _rectangle(ink, affine):
    """Smallest rectangle with the digit's rotation around its pixels, (4, 2)."""
    linear = affine[:, :2]
    axes = linear / np.sqrt(np.linalg.det(linear))
    y, x = np.nonzero(ink)
    own = np.stack([x, y], 1) @ axes
    half = np.abs(axes).sum(0) / 2  # reach of a pixel's corners from its centre
    low, high = own.min(0) - half, own.max(0) + half
    box = np.array([low, [high[0], low[1]], high, [low[0], high[1]]])
    return box @ axes.T + 0.5
