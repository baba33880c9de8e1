"""Backgrounds of the demo's scenes: plain, gradients, stripes, checks, clouds and patches."""

import cv2
import numpy as np


def draw_background(rng, size):
    """Return a background, float32 (size, size, 3) from 0 to 1."""
    dark, light = np.sort(rng.uniform(0.1, 0.9, (2, 3)), axis=0).astype(np.float32)
    pattern = rng.choice(_PATTERNS)(rng, size)
    pattern = pattern[..., None] * np.float32(rng.uniform(0.3, 1))
    grain = rng.normal(0, rng.uniform(0, 0.05), (size, size, 3))
    return np.clip(dark + (light - dark) * pattern + grain, 0, 1).astype(np.float32)


def _plain(rng, size):
    return np.full((size, size), rng.uniform(), np.float32)


def _gradient(rng, size):
    return _spread(_along(rng, size))


def _stripes(rng, size):
    wave = np.sin(2 * np.pi * _along(rng, size) / rng.uniform(8, 40))
    return _spread(np.clip(wave * rng.uniform(0.6, 4), -1, 1))


def _checks(rng, size):
    cell = rng.uniform(8, 32)
    y, x = np.mgrid[:size, :size] + rng.uniform(0, cell, 2)[:, None, None]
    return ((x // cell + y // cell) % 2).astype(np.float32)


def _clouds(rng, size):
    """Noise of several wavelengths."""
    total = np.zeros((size, size), np.float32)
    fade = rng.uniform(0.4, 0.8)
    for octave in range(5):
        grid = rng.uniform(-1, 1, (2 + 2**octave, 2 + 2**octave)).astype(np.float32)
        total += fade**octave * cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC)
    return _spread(total)


def _patches(rng, size):
    """Ellipses and bars on top of each other."""
    canvas = np.full((size, size), rng.uniform(), np.float32)
    for _ in range(rng.integers(4, 12)):
        centre = tuple(int(v) for v in rng.integers(0, size, 2))
        axes = tuple(int(v) for v in rng.integers(6, size // 2, 2))
        cv2.ellipse(canvas, centre, axes, rng.uniform(0, 180), 0, 360, rng.uniform(), -1)
    return canvas


_PATTERNS = (_plain, _gradient, _stripes, _checks, _clouds, _patches)


def _along(rng, size):
    """Distance along a random direction, (size, size) in pixels."""
    turn = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:size, :size]
    return np.cos(turn) * x + np.sin(turn) * y


def _spread(values):
    low, high = values.min(), values.max()
    return ((values - low) / max(high - low, 1e-6)).astype(np.float32)
