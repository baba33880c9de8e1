"""Filter atoms: frozen coefficients and trained atoms, of any dictionary that spans the kernels."""

import numpy as np
import pytest
from torch import nn

import mmpeft
from tests.adapting import adapted, close


@pytest.mark.parametrize(
    'make',
    [
        lambda: nn.Conv2d(4, 6, 3, groups=2),
        lambda: nn.ConvTranspose3d(2, 4, (1, 2, 3)),
        lambda: nn.Conv2d(6, 6, 7, groups=6),
    ],
)
def test_frozen_coefficients_and_trained_atoms(make):
    frozen, new, f = adapted(make(), dict(type='FilterAtoms'), std=0.1)
    kernels, positions = frozen.reshape(-1, len(f['atoms'])), len(f['atoms'])
    dictionary = np.random.default_rng(0).normal(size=(positions, positions))
    coefficients = kernels @ np.linalg.inv(dictionary)
    changed = dictionary + dictionary @ f['atoms']
    close(new, (coefficients @ changed).reshape(frozen.shape), 1e-9)


@pytest.mark.parametrize(
    'make, rows, columns', [(lambda: nn.Linear(8, 6), 3, 4), (lambda: nn.Conv2d(5, 7, 1), 1, 1)]
)
def test_a_matrix_is_cut_into_blocks(make, rows, columns):
    frozen, new, f = adapted(make(), dict(type='FilterAtoms'))
    matrix, expected = frozen.reshape(frozen.shape[:2]), np.zeros(frozen.shape[:2])
    for i in range(0, len(matrix), rows):
        for j in range(0, matrix.shape[1], columns):
            place = np.s_[i : i + rows, j : j + columns]
            block = matrix[place].ravel()
            expected[place] = (block + block @ f['atoms']).reshape(rows, columns)
    close(new, expected.reshape(frozen.shape))


def test_a_layer_has_few_parameters():
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Linear(64, 64))
    assert mmpeft.inject(model, dict(type='FilterAtoms')).adapters == 81 + 256
