"""SAM-PARSER and SVDiff: shifts of singular values."""

import numpy as np
import pytest
import torch

import mmpeft
from mmpeft.injection.site import adapters_of
from tests.adapting import adapted, close, numpy_svd
from tests.cases import KINDS

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


@pytest.mark.parametrize('rank', [None, 2])
def test_sam_parser_shifts_singular_values(layer, rank):
    frozen, new, f = adapted(layer, dict(type='SAMPARSER', rank=rank))
    left, values, right = numpy_svd(frozen, f['left'])
    k = len(f['shift'])
    values[:k] += f['shift']
    close(new, (left * values @ right.T).reshape(frozen.shape))


@pytest.mark.parametrize('rank', [None, 2])
def test_svdiff_shifts_singular_values_down_to_zero(layer, rank):
    frozen, new, f = adapted(layer, dict(type='SVDiff', rank=rank), std=2.0)
    with torch.no_grad():  # of the two that always train, one that is cut and one that is not
        shift = adapters_of(layer, 'weight')[0].shift
        shift[:2] = torch.tensor([-10.0, 0.5])
        f['shift'], new = shift.numpy(), layer.weight.numpy()
    left, values, right = numpy_svd(frozen, f['left'])
    k = len(f['shift'])
    values[:k] = np.maximum(values[:k] + f['shift'], 0)
    close(new, (left * values @ right.T).reshape(frozen.shape))


@pytest.mark.parametrize('method', ['SAMPARSER', 'SVDiff'])
@pytest.mark.parametrize('rank', [None, 1, 3, 100])
def test_singular_values_in_closed_form(layer, method, rank):
    n, m = len(layer.weight), layer.weight[0].numel()
    summary = mmpeft.inject(layer, dict(type=method, rank=rank), dict(kinds=KINDS))
    k = min(n, m) if rank is None else min(rank, n, m)
    assert summary.adapters == k
    stored = mmpeft.checkpoint.keys.adapter_state_dict(layer)
    assert sum(v.numel() for v in stored.values()) == k + k * (n + m) + k
