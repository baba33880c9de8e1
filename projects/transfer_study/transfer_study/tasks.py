"""The tasks of the study: what runs a trial of each, and what the plan needs to know of it."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np

from .backbones import BACKBONES
from .classification import SETS, classify
from .dense import CONFIGS, run_dense
from .trial import Trial


def spread(key: str, first: float, last: float) -> list[dict]:
    """Twelve settings of a key, evenly spaced on a logarithmic scale."""
    return [{key: float(f'{x:.2g}')} for x in np.geomspace(first, last, 12)]


@dataclass(frozen=True)
class Task:
    """A task, and the effort that each method gets on it.

    Attributes:
        run: Runs a trial; returns its scores and costs, or ``failed`` with the reason.
        metric, loss: What records call the score, from 0 to 1, and the loss.
        heads: The settings that are tried with the frozen backbone. All methods take over the best.
        rates: Learning rates that are tried with each scale.
        backbones: Names of those that the task can be run with.
        size: Side of the images, pixels, unless another one is asked for.
        short, long, final: Passes over the training images at the three stages.
        trains_frozen: The frozen backbone's heads train for as many passes; else they converge.
    """

    run: Callable[[Trial], dict]
    metric: str
    loss: str
    heads: list[dict]
    rates: tuple[float, ...]
    backbones: Collection[str]
    size: int
    short: int
    long: int
    final: int
    trains_frozen: bool


CLASSIFICATION = Task(
    run=classify,
    metric='accuracy',
    loss='held_loss',
    heads=spread('ridge', 1e-5, 1),
    rates=(1e-3, 3e-3, 1e-2),
    backbones=BACKBONES,
    size=64,
    short=4,
    long=8,
    final=12,
    trains_frozen=False,
)
TASKS = dict.fromkeys(SETS, CLASSIFICATION) | {
    name: Task(
        run=run_dense,
        metric=scenes.metric,
        loss='loss',
        heads=spread('head_rate', 1e-5, 1e-2),
        rates=(3e-4, 1e-3, 3e-3),
        backbones=(scenes.backbone,),
        size=128,
        short=2,
        long=4,
        final=6,
        trains_frozen=True,
    )
    for name, scenes in CONFIGS.items()
}


def run_trial(trial: Trial) -> dict:
    """Run a trial; returns its scores and costs, or ``failed`` with the reason."""
    return TASKS[trial.task].run(trial)
