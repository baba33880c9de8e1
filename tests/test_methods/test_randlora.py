"""RandLoRA: diagonals around random bases, equal to peft's."""

import copy

import numpy as np
import peft
import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.injection.site import adapters_of
from mmpeft.methods.randlora import random_bases
from tests.adapting import EqualBlocks, adapted, adapter_at, close
from tests.cases import randomize


def test_a_sum_of_scaled_bases(layer):
    frozen, new, f = adapted(layer, dict(type='RandLoRA', rank=2, scale=0.3))
    matrix = frozen.reshape(len(frozen), -1)
    terms = zip(f['diagonal_r'], f['diagonal_m'], f['bases_B'].transpose(1, 0, 2), strict=True)
    total = sum(b @ np.diag(left) @ f['bases_A'] @ np.diag(right) for left, right, b in terms)
    total = total if matrix.shape[0] >= matrix.shape[1] else total.T
    close(new, frozen + 0.3 * total.reshape(frozen.shape))
    assert np.linalg.matrix_rank(total) == min(matrix.shape)


@pytest.mark.parametrize('sizes', [(9, 12), (12, 9)])
def test_randlora_equals_pefts(sizes):
    layer, x = nn.Linear(*sizes).double(), torch.randn(3, sizes[0], dtype=torch.float64)
    ours = nn.Sequential(copy.deepcopy(layer))
    mmpeft.inject(ours, dict(type='RandLoRA', rank=4))
    randomize(ours)
    f = adapters_of(ours[0], 'weight')[0].factors
    config = peft.RandLoraConfig(r=4, randlora_alpha=80, target_modules=['0'])
    theirs = peft.get_peft_model(nn.Sequential(layer), config).base_model.model.double()
    with torch.no_grad():
        theirs[0].randlora_lambda['default'].copy_(f['diagonal_r'].T)
        theirs[0].randlora_gamma['default'].copy_(f['diagonal_m'])
        # Its rows of A are ordered by r first, its columns of B by the basis first.
        ordered = f['bases_B'].transpose(1, 2).reshape(12, 3, 4)
        theirs[0].randlora_A['default'] = f['bases_A'][:, None]
        theirs[0].randlora_B['default'] = ordered
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)


def test_it_starts_with_pefts_diagonals():
    layer = nn.Linear(9, 12)
    mmpeft.inject(layer, dict(type='RandLoRA', rank=4))
    f = adapters_of(layer, 'weight')[0].factors
    assert not f['diagonal_r'].any() and torch.equal(f['diagonal_m'], torch.full((3, 9), 1 / 9))


def test_bases_are_shared_not_stored_and_never_change():
    model = EqualBlocks()
    mmpeft.inject(model, dict(type='RandLoRA', rank=4))
    # A weight and its transpose have the same bases.
    for name in ('bases_A', 'bases_B'):
        holders = {
            id(getattr(adapter_at(model, f'{w}.{n}'), name)) for w in ('up', 'down') for n in '01'
        }
        assert len(holders) == 1
    assert not any('bases' in key for key in model.state_dict())
    up, down = random_bases(300, 200, 150, 0)
    assert abs(up.std() - 1) < 0.01 and abs(down.std() - 1) < 0.01
    drawn = np.random.RandomState([0, 3, 2, 2]).uniform(-(3**0.5), 3**0.5, 6)
    close(random_bases(3, 2, 2, 0)[0].numpy().ravel(), drawn.astype(np.float32))


def test_a_seed_that_is_refused():
    with pytest.raises(UsageError, match='seed=-1 must be an integer from 0'):
        mmpeft.METHODS.build(dict(type='RandLoRA', seed=-1))
