"""Scores of several seeds: intervals, paired differences, and p-values corrected for their number.

Scores of a method are a mapping from seed to score, since runs of one seed share what the seed
chooses (images, order, head) and are compared with one another.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

Scores = Mapping[int, float]

LEVEL = 0.05
"""Differences with a smaller p-value are called shown."""


class Difference(NamedTuple):
    """The mean difference of two methods over the seeds that both have.

    Attributes:
        better, worse: Their names; the difference is ``better - worse``.
        mean: Of the differences.
        half: Half the width of its 95% interval by Student's t.
        p: Of a mean of zero, two-sided, adjusted for all differences that were asked for.
        seeds: How many pairs there are.
    """

    better: str
    worse: str
    mean: float
    half: float
    p: float
    seeds: int

    @property
    def verdict(self) -> str:
        """``'higher'``, ``'lower'`` or ``'no difference shown'``."""
        if self.p >= LEVEL:
            return 'no difference shown'
        return 'higher' if self.mean > 0 else 'lower'

    @property
    def p_value(self) -> str:
        """``'p = 0.012'``, or ``'p < 0.001'``."""
        return f'p = {self.p:.3f}' if self.p >= 0.001 else 'p < 0.001'


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95% interval by Student's t, NaN for a single value."""
    if len(values) < 2:
        return float(np.mean(values)), float('nan')
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return float(np.mean(values)), float(half)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number.

    Source: Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    order = np.argsort(p_values)
    raised = [(len(order) - i) * p_values[k] for i, k in enumerate(order)]
    adjusted = np.minimum(np.maximum.accumulate(raised), 1.0)
    return adjusted[np.argsort(order)].tolist()


def differences(scores: Mapping[str, Scores], pairs: Sequence[tuple[str, str]]) -> list[Difference]:
    """Paired differences of those pairs that have two seeds or more in common."""
    found = []
    for a, b in pairs:
        shared = sorted(scores.get(a, {}).keys() & scores.get(b, {}).keys())
        if len(shared) > 1:
            found.append((a, b, [scores[a][seed] - scores[b][seed] for seed in shared]))
    p_values = holm([_p_value(gaps) for *_, gaps in found])
    return [
        Difference(a, b, *interval(gaps), p, len(gaps))
        for (a, b, gaps), p in zip(found, p_values, strict=True)
    ]


def _p_value(gaps):
    if np.ptp(gaps) == 0:  # Student's t is infinite, or undefined
        return float(gaps[0] == 0)
    return float(stats.ttest_1samp(gaps, 0).pvalue)


def below_best(scores: Mapping[str, Scores]) -> list[Difference]:
    """The other methods, best first, each against the one of the highest mean."""

    def mean(name):
        return float(np.mean(list(scores[name].values())))

    best, *others = sorted(scores, key=lambda name: -mean(name))
    return differences(scores, [(name, best) for name in others])
