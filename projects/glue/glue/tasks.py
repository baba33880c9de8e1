"""The eight tasks of GLUE (arXiv:1804.07461), and a task of one's own."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats
from sklearn import metrics

from mmpeft.errors import UsageError, suggest


def accuracy(outputs: np.ndarray, labels: np.ndarray) -> float:
    return float(metrics.accuracy_score(labels, outputs.argmax(1)))


def f1(outputs: np.ndarray, labels: np.ndarray) -> float:
    return float(metrics.f1_score(labels, outputs.argmax(1)))


def matthews(outputs: np.ndarray, labels: np.ndarray) -> float:
    return float(metrics.matthews_corrcoef(labels, outputs.argmax(1)))


def pearson(outputs: np.ndarray, labels: np.ndarray) -> float:
    return float(stats.pearsonr(outputs[:, 0], labels).statistic)


def spearman(outputs: np.ndarray, labels: np.ndarray) -> float:
    return float(stats.spearmanr(outputs[:, 0], labels).statistic)


def correlation(outputs: np.ndarray, labels: np.ndarray) -> float:
    """The mean of Pearson's and Spearman's, as GLUE's leaderboard averages them."""
    return (pearson(outputs, labels) + spearman(outputs, labels)) / 2


@dataclass(frozen=True)
class Task:
    """What a model reads, and how its outputs are scored.

    Attributes:
        sentences: Columns of one text, or of a pair.
        metrics: Of outputs (N, classes), or (N, 1) of a regression, and labels (N,); the papers'
            tables print the first.
        splits: That are scored; the tables print the first.
        label: Column of the labels: whole numbers or names of classes, or fractions to be
            regressed.
    """

    sentences: tuple[str, ...]
    metrics: tuple[Callable[[np.ndarray, np.ndarray], float], ...] = (accuracy,)
    splits: tuple[str, ...] = ('validation',)
    label: str = 'label'


TASKS = dict(
    mnli=Task(('premise', 'hypothesis'), splits=('validation_matched', 'validation_mismatched')),
    sst2=Task(('sentence',)),
    cola=Task(('sentence',), (matthews, accuracy)),
    qqp=Task(('question1', 'question2'), (accuracy, f1)),
    qnli=Task(('question', 'sentence')),
    rte=Task(('sentence1', 'sentence2')),
    mrpc=Task(('sentence1', 'sentence2'), (accuracy, f1)),
    stsb=Task(('sentence1', 'sentence2'), (correlation, pearson, spearman)),
)


def find_task(name: str) -> Task:
    """A task of GLUE.

    Raises:
        UsageError: There is no such task.
    """
    if name not in TASKS:
        raise UsageError(
            f'GLUE has no task {name!r}. {suggest(name, TASKS)} For a data set of your own name '
            'its folder with --data and its columns with --sentences and --label.'
        )
    return TASKS[name]


def score(task: Task, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """All of a task's metrics by name, the one that the tables print first."""
    return {metric.__name__: metric(outputs, labels) for metric in task.metrics}
