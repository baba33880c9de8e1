"""OFT and BOFT: rotations of columns, equal to peft's where it is exact."""

import copy

import numpy as np
import peft
import pytest
import torch
from scipy.linalg import block_diag
from torch import nn

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.injection.site import adapters_of
from mmpeft.methods.oft import nearest_size
from tests.adapting import adapted, close
from tests.cases import randomize

pytestmark = pytest.mark.filterwarnings('ignore:.*CUDA|Setting boft')


def rotation(triangle, size):
    skew = np.zeros((size, size))
    skew[np.triu_indices(size, 1)] = triangle
    skew -= skew.T
    return (np.eye(size) - skew) @ np.linalg.inv(np.eye(size) + skew)


def test_oft_is_block_diagonal_rotations_of_the_columns(layer):
    frozen, new, f = adapted(layer, dict(type='OFT', block_size=3))
    columns = frozen[0].size
    size = columns // f['triangle'].shape[1]
    turned = block_diag(*(rotation(t, size) for t in f['triangle'][0]))
    close(new, (frozen.reshape(len(frozen), -1) @ turned.T).reshape(frozen.shape))
    norms = [np.linalg.norm(w.reshape(len(w), -1), axis=1) for w in (frozen, new)]
    close(*norms)


def with_peft(layer, config):
    config.target_modules = {'0'}
    model = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer)), config).base_model.model
    return model.double()


def test_oft_equals_pefts_without_its_series():
    layer, x = nn.Linear(24, 10).double(), torch.randn(3, 24, dtype=torch.float64)
    ours = nn.Sequential(copy.deepcopy(layer))
    mmpeft.inject(ours, dict(type='OFT', block_size=8))
    randomize(ours)
    config = peft.OFTConfig(r=0, oft_block_size=8, use_cayley_neumann=False)
    theirs = with_peft(layer, config)
    factors = adapters_of(ours[0], 'weight')[0].factors
    theirs[0].oft_R['default'].weight.data.copy_(factors['triangle'][0])
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)  # its identity is float32


@pytest.mark.parametrize('size, factors', [(4, 1), (4, 3), (2, 4)])
def test_boft_equals_pefts_butterfly(size, factors):
    """peft's permutations; it computes several factors on a GPU only."""
    frozen, new, f = adapted(
        nn.Conv2d(4, 6, 2), dict(type='BOFT', block_size=size, factors=factors)
    )
    theirs = with_peft(nn.Linear(16, 6), peft.BOFTConfig(boft_block_size=size))[0]
    turned = np.eye(16)
    for step, triangles in enumerate(f['triangle']):
        order = theirs.block_butterfly_perm(16, 16 // size // 2**step, size // 2, factors - 1)
        place = theirs.perm2mat(order).numpy()
        turned = place @ block_diag(*(rotation(t, size) for t in triangles)) @ place.T @ turned
    assert len(f['triangle']) == factors and (
        factors == 1 or (abs(turned) > 1e-9).sum() > 16 * size
    )
    rotated = turned @ frozen.reshape(6, 16).T
    close(new, ((1 + f['shift']) * rotated).T.reshape(frozen.shape))


def test_boft_equals_pefts_layer():
    layer, x = nn.Linear(16, 10), torch.randn(3, 16)
    ours = nn.Sequential(copy.deepcopy(layer))
    mmpeft.inject(ours, dict(type='BOFT', block_size=4, factors=1))
    randomize(ours)
    theirs = with_peft(layer, peft.BOFTConfig(boft_block_size=4)).float()
    f = adapters_of(ours[0], 'weight')[0].factors
    rows, columns = torch.triu_indices(4, 4, 1)
    with torch.no_grad():
        rotations = theirs[0].boft_R['default'].zero_()
        rotations[:, :, rows, columns] = 2 * f['triangle']  # it takes half of Q - Q^T
        theirs[0].boft_s['default'].copy_(1 + f['shift'][:, None])
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    'columns, size, factors, expected',
    [(768, 32, 1, (32, 1)), (49, 32, 1, (49, 1)), (48, 8, 2, (8, 2)), (49, 8, 2, (7, 1)),
     (36, 8, 4, (6, 2)), (2, 8, 3, (2, 1)), (37, 32, 1, (37, 1))],
)  # fmt: skip
def test_blocks_that_fit(columns, size, factors, expected):
    assert nearest_size(columns, size, factors) == expected


def test_a_single_column_is_refused():
    with pytest.raises(UsageError, match='OFT'):
        mmpeft.inject(nn.Conv2d(4, 4, 1, groups=4), dict(type='OFT'))


@pytest.mark.parametrize('method', [dict(type='OFT', block_size=1), dict(type='BOFT', factors=0)])
def test_arguments_that_are_refused(method):
    with pytest.raises(UsageError, match='must be'):
        mmpeft.METHODS.build(method)


@pytest.mark.parametrize('name', ['OFT', 'BOFT'])
def test_in_bfloat16(name):
    model = nn.Sequential(nn.Linear(8, 8))
    mmpeft.inject(model, dict(type=name, block_size=4))
    randomize(model)
    x = torch.randn(3, 8)
    expected = model(x)
    model.bfloat16()
    torch.testing.assert_close(model(x.bfloat16()).float(), expected, rtol=0.05, atol=0.05)
