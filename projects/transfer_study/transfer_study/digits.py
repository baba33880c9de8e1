"""Scenes of handwritten digits, as the demo draws them. No scan is in two parts.

The test scenes are of the scans that the demo validates on. All others are there to train on; while
rates are tuned, a quarter of these is held out. The held scenes are the same in every draw.
"""

from pathlib import Path

import numpy as np
from digit_scenes import CLASSES, Digits, load_scans
from scene_files import write_scenes

from .trial import Trial


def write_digits(trial: Trial, root: Path, numbers: dict[str, int]) -> None:
    """Write so many scenes of ``train`` and ``val`` in the formats of COCO, ADE20K and DOTA."""
    parts = load_scans()
    if trial.stage == 'tune':
        scans, labels = parts['train']
        held = np.arange(len(labels)) % 4 == 3
        parts = dict(train=(scans[~held], labels[~held]), val=(scans[held], labels[held]))
    seeds = dict(train=[trial.seed, 0], val=[0, 1])
    height = (trial.size * 7 / 32, trial.size * 13 / 32)
    for part, number in numbers.items():
        drawn = np.random.default_rng(seeds[part]), Digits(*parts[part]), CLASSES
        write_scenes(root, part, *drawn, number, trial.size, height=height)
