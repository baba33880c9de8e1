"""The tasks of the study: what runs a trial of each."""

from .classification import SETS, classify
from .trial import Trial

TASKS = dict.fromkeys(SETS, classify)


def run_trial(trial: Trial) -> dict:
    """Run a trial; returns its scores and costs, or ``failed`` with the reason."""
    return TASKS[trial.task](trial)
