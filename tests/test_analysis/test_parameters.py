"""Accuracy against parameters."""

import numpy as np
import pytest

from mmpeft.analysis.parameters import ppt


def test_ppt():
    assert ppt(52.9, 0) == 0.529
    assert ppt(80.0, 90_000_000) == pytest.approx(0.8 / np.e, rel=1e-12)
