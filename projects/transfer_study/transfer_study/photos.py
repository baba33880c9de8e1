"""Scenes of photos. No cut-out and no photograph is in two parts.

The test scenes are of the cut-outs and photographs that the demo validates on. All others are there
to train on; while rates are tuned, a quarter of these is held out. The held scenes are the same in
every draw.
"""

from pathlib import Path

import numpy as np
import photo_scenes
from scene_files import write_scenes

from .trial import Trial


def write_photos(trial: Trial, root: Path, numbers: dict[str, int]) -> None:
    """Write so many scenes of ``train`` and ``val`` in the formats of COCO, ADE20K and DOTA."""
    parts = photo_scenes.load_photos()
    parts = parts if trial.stage == 'final' else parts['train'].split()
    seeds = dict(train=[trial.seed, 0], val=[0, 1])
    length = (trial.size * 9 / 32, trial.size * 9 / 16)
    for part, number in numbers.items():
        drawn = np.random.default_rng(seeds[part]), parts[part], photo_scenes.CLASSES
        write_scenes(root, part, *drawn, number, trial.size, length=length)
