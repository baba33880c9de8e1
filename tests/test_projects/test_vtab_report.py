"""The table of VTAB-1k, against LieRA's own."""

import io
from itertools import chain

import numpy as np
import pytest
from rich.console import Console

# LieRA's Table 1, its rank 16; the average that it prints is 75.5.
LIERA = (
    60.2, 90.4, 71.8, 92.9, 92.9, 89.5, 46.2, 84.2, 94.5, 83.5, 74.7,
    85.6, 69.0, 50.8, 79.9, 97.1, 61.5, 36.2, 36.4,
)  # fmt: skip


@pytest.fixture(scope='module')
def report(script):
    return script('projects/vtab', 'vtab.report')


@pytest.fixture(scope='module')
def groups(report):
    return report.GROUPS.values()


def records(groups, offsets=(0.0,), memory=None):
    """LieRA's figures, moved by an offset for each seed."""
    return [
        dict(task=task, seed=s, accuracy=a + offset, backbone_parameters=14_385_472, memory=memory)
        for s, offset in enumerate(offsets)
        for task, a in zip(chain(*groups), LIERA, strict=True)
    ]


def test_the_means_of_the_paper(report, groups):
    found = {row.name: row for row in report.rows(records(groups))}
    assert [len(tasks) for tasks in groups] == [7, 4, 8]
    assert found['mean of 3 groups'].accuracy == pytest.approx(75.5, abs=0.05)
    assert found['mean of 19 tasks'].accuracy == pytest.approx(np.mean(LIERA), rel=1e-12)
    assert found['specialized (4)'].accuracy == pytest.approx(np.mean(LIERA[7:11]), rel=1e-12)
    assert found['cifar'].spread is None and found['cifar'].memory is None


def test_the_spread_of_a_mean_is_over_seeds(report, groups):
    offsets = (-1.0, 0.0, 3.0)
    given = records(groups, offsets, memory=2**31)
    found = report.rows(given)
    for row in found:
        assert row.spread == pytest.approx(np.std(offsets, ddof=1), rel=1e-9)
    console = Console(width=100, file=io.StringIO())
    console.print(report.table(given))
    text = console.file.getvalue()
    assert text.count('2.08') == len(found) and '2.00 GiB' in text and '14.39 M' in text
