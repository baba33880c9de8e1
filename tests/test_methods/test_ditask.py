"""DiTASK: the flow against an integrator of scipy's, and what it does to singular values."""

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import nn

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.methods.ditask import flow
from tests.adapting import adapted, close


def integrated(places, velocities):
    """Places after the time 1, by a numerical integration."""
    ends = np.linspace(0, 1, len(velocities))
    solution = solve_ivp(
        lambda _, x: np.interp(x, ends, velocities),
        (0, 1),
        places,
        rtol=1e-10,
        atol=1e-12,
        max_step=0.005,
    )
    return solution.y[:, -1]


@pytest.mark.parametrize('size', [0.02, 0.3, 2.0])
def test_the_flow_is_the_velocitys_integral(size):
    """Places on the ends of cells and between, which cross none, some and many cells."""
    random = np.random.default_rng(3)
    velocities = np.pad(random.normal(size=7) * size, 1)
    velocities[3:5] = size  # constant in a cell
    places = np.sort(np.concatenate([random.uniform(size=10), np.linspace(0, 1, 9)]))
    moved = flow(torch.from_numpy(places), torch.from_numpy(velocities)).numpy()
    np.testing.assert_allclose(places + moved, integrated(places, velocities), atol=1e-9)


@pytest.mark.parametrize('make', [lambda: nn.Linear(9, 7), lambda: nn.Conv2d(3, 6, 3)])
def test_singular_values_are_resampled(make):
    frozen, new, f = adapted(make(), dict(type='DiTASK', cells=4))
    left, values, right = np.linalg.svd(frozen.reshape(len(frozen), -1), full_matrices=False)
    places = np.linspace(0, 1, len(values))
    warped = integrated(places, np.pad(f['theta'], 1))
    expected = left * np.interp(warped, places, values) @ right
    np.testing.assert_allclose(new.reshape(expected.shape), expected, atol=1e-9)
    found = np.linalg.svd(new.reshape(len(new), -1), compute_uv=False)
    close(found[[0, -1]], values[[0, -1]], 1e-9)


def test_queries_keys_and_values_are_cut():
    frozen, new, f = adapted(nn.Linear(5, 15), dict(type='DiTASK', cells=4))
    assert f['values'].shape == (3, 5)
    for part, changed in zip(np.split(frozen, 3), np.split(new, 3), strict=True):
        values, found = (np.linalg.svd(w, compute_uv=False) for w in (part, changed))
        places = np.linspace(0, 1, 5)
        warped = integrated(places, np.pad(f['theta'], 1))
        np.testing.assert_allclose(found, np.interp(warped, places, values), atol=1e-9)


def test_a_weight_has_one_number_less_than_cells():
    assert mmpeft.inject(nn.Linear(9, 7), dict(type='DiTASK')).adapters == 31


def test_what_is_refused():
    with pytest.raises(UsageError, match='cells=1 must be 2 or more'):
        mmpeft.METHODS.build(dict(type='DiTASK', cells=1))
    with pytest.raises(UsageError, match='DiTASK'):
        mmpeft.inject(nn.Linear(9, 2), dict(type='DiTASK'))


def test_the_flow_in_a_transform():
    """Many velocities at once, of which some cross cells and some do not."""
    velocities = torch.nn.functional.pad(torch.randn(4, 7).double(), (1, 1))
    velocities *= torch.tensor([0.0, 0.02, 0.3, 2.0])[:, None]
    places = torch.linspace(0, 1, 9).double()
    found = torch.func.vmap(lambda each: flow(places, each))(velocities)
    torch.testing.assert_close(found, torch.stack([flow(places, each) for each in velocities]))
