"""Handwritten digits: scikit-learn's 8x8 scans over drawn backgrounds."""

import cv2
import numpy as np
from digit_backgrounds import draw_background
from scenes import SOLID, Sprite, to_uint8, turned
from sklearn.datasets import load_digits

CLASSES = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')
CONTRAST = (0.35, 0.7)  # of a digit to what is below it, in each of red, green and blue


class Digits:
    """Digits of random colours, as :func:`scenes.draw_scene` takes them.

    Args:
        scans (np.ndarray): float32 (N, 8, 8) from 0 (paper) to 1 (ink).
        labels (np.ndarray): Their classes, (N, ).
    """

    def __init__(self, scans, labels):
        self.scans, self.labels = scans, labels

    def background(self, rng, size):
        """See :func:`digit_backgrounds.draw_background`."""
        return draw_background(rng, size)

    def place(self, rng, size, height=(28, 52), turn=35):
        """A digit somewhere.

        Args:
            rng (np.random.Generator): The only source of randomness.
            size (int): Side of the picture in pixels.
            height (tuple[float, float]): Range of the digit's height in pixels.
            turn (float): Largest rotation to either side in degrees.
        """
        pick = rng.integers(len(self.labels))
        alpha, linear = _place(rng, self.scans[pick], size, height, turn)

        def colour(image):
            """One that contrasts with what is below."""
            below = image[alpha >= SOLID].mean(0)
            contrast = rng.uniform(*CONTRAST, 3)
            brighter = below.mean() < rng.uniform(0.4, 0.6)
            found = np.clip(below + contrast if brighter else below - contrast, 0, 1)
            return found.astype(np.float32)

        return Sprite(int(self.labels[pick]), alpha, linear, colour)


def load_scans():
    """Return the scans as ``{'train': (scans, labels), 'val': ...}``.

    The split is fixed and disjoint: every fifth scan is for validation. Scans
    are float32 (N, 8, 8) from 0 (paper) to 1 (ink).
    """
    data = load_digits()
    scans, labels = data.images.astype(np.float32) / 16, data.target
    is_val = np.arange(len(labels)) % 5 == 4
    return {'train': (scans[~is_val], labels[~is_val]), 'val': (scans[is_val], labels[is_val])}


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


def _place(rng, scan, size, height, turn):
    """Draw a scan somewhere.

    Returns:
        Opacity of its ink, float32 (size, size) from 0 to 1, with edges that
        are one or two pixels wide at any scale; and its rotation and zoom, (2, 2).
    """
    tall = rng.uniform(*height)
    centre = rng.uniform(tall / 2, size - tall / 2, 2)
    linear = tall / 8 * turned(rng.uniform(-turn, turn))
    shift = centre - linear @ np.array([3.5, 3.5])
    affine = np.concatenate([linear, shift[:, None]], 1)
    grey = cv2.warpAffine(scan, affine, (size, size), flags=cv2.INTER_CUBIC)
    zoom = np.sqrt(abs(np.linalg.det(linear)))
    return np.clip((grey - SOLID) * zoom / 2 + SOLID, 0, 1), linear
