"""Statistics over seeds, against scipy's and by hand."""

from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from mmpeft.analysis.seeds import below_best, differences, holm, interval


def test_holm_rejects_what_the_step_down_procedure_rejects():
    p_values = list(np.random.default_rng(0).uniform(0, 0.2, 6))
    adjusted = holm(p_values)
    smallest = sorted(p_values)
    assert min(adjusted) == pytest.approx(6 * smallest[0])
    by_p = [a for _, a in sorted(zip(p_values, adjusted, strict=True))]
    assert all(a <= b for a, b in pairwise(by_p)) and max(adjusted) <= 1
    rejected = 0
    while rejected < 6 and smallest[rejected] <= 0.05 / (6 - rejected):
        rejected += 1
    assert sum(p <= 0.05 for p in adjusted) == rejected


def test_an_interval():
    values = np.random.default_rng(0).normal(size=5)
    mean, half = interval(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    np.testing.assert_allclose((mean - half, mean + half), expected)
    assert np.isnan(interval([1.0])[1])


def test_differences_are_paired_by_seed():
    rng = np.random.default_rng(1)
    draw = rng.normal(size=5)
    scores = {
        'a': {seed: 80 + 3 * draw[seed] for seed in range(5)},
        'b': {seed: 81 + 3 * draw[seed] + 0.1 * rng.normal() for seed in range(1, 5)},
        'alone': {7: 90.0},
    }
    b, equal = differences(scores, [('b', 'a'), ('alone', 'a'), ('a', 'missing'), ('a', 'a')])
    gaps = [scores['b'][seed] - scores['a'][seed] for seed in range(1, 5)]
    test = stats.ttest_rel([*scores['b'].values()], [scores['a'][s] for s in range(1, 5)])
    assert (b.seeds, b.verdict) == (4, 'higher') and b.mean == pytest.approx(np.mean(gaps))
    low, high = test.confidence_interval(0.95)
    assert (b.mean - b.half, b.mean + b.half) == pytest.approx((low, high))
    assert b.p == pytest.approx(2 * test.pvalue)  # of two differences
    assert (equal.mean, equal.p, equal.verdict) == (0, 1, 'no difference shown')
    assert differences(scores, [('a', 'b')])[0].verdict == 'lower'


def test_what_is_below_the_best():
    scores = dict(
        a={0: 4, 1: 5, 2: 6},
        b={0: 8, 1: 9, 2: 10},
        c={0: 9.0, 1: 8.0, 2: 9.5},
    )
    c, a = below_best(scores)
    assert (c.better, c.worse, c.verdict) == ('c', 'b', 'no difference shown')
    assert (a.better, a.worse, a.verdict) == ('a', 'b', 'lower')
