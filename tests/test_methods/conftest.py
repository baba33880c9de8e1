"""Fixtures of the tests of single methods."""

import pytest

from tests.adapting import WEIGHTS


@pytest.fixture(params=WEIGHTS)
def layer(request):
    """A layer with a weight of each role and proportion, in float64."""
    return WEIGHTS[request.param]().double()
