"""What a run depends on."""

import hashlib
import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Trial:
    """What a run depends on, and nothing else: the same trial gives the same record.

    Attributes:
        task, backbone: Names of :data:`.tasks.TASKS` and :data:`.backbones.BACKBONES`.
        size: Side of the square images, pixels.
        method: A name of :data:`.methods.METHODS`.
        budget: Parameters of the adapters, at most; 0 if the method has no rank.
        rate: Learning rate of the adapters (AdamW, cosine).
        scale: Factor on the method's default scale.
        ridge: Weight decay under which the head converges before the adapters train.
        epochs: Passes over the training images.
        stage: ``'tune'`` trains on a part of the training images and scores the rest;
            ``'final'`` trains on all and scores the test set, once, after the last epoch.
        seed: Chooses the images, the order and the initial adapters.
        head_rate: Learning rate of the heads; None for the task's own.
    """

    task: str
    backbone: str
    size: int
    method: str
    budget: int
    rate: float
    scale: float
    ridge: float
    epochs: int
    stage: str
    seed: int
    head_rate: float | None = None

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits that name the trial, by what is set."""
        given = {key: value for key, value in asdict(self).items() if value is not None}
        return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:12]
