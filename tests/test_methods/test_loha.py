"""LoHa: elementwise products of low-rank matrices, and what LoKr shares with it."""

from math import prod

import numpy as np
import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.methods.loha import LoHa
from tests.adapting import adapted, close, count, init, spec_of, weights_of_all_layers
from tests.cases import randomize

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


TUCKER = {3: 'abk,ia,bj->ijk', 4: 'abkl,ia,bj->ijkl', 5: 'abklm,ia,bj->ijklm'}


KERNELS = dict(
    conv1d=lambda: nn.Conv1d(4, 6, 3, groups=2),
    conv2d=lambda: nn.Conv2d(4, 6, (3, 5)),
    depthwise=lambda: nn.Conv2d(6, 6, 7, groups=6),
    conv3d=lambda: nn.Conv3d(4, 5, (1, 2, 3)),
    transposed=lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
)


@pytest.mark.parametrize('layer', [nn.Linear(6, 5), nn.Embedding(9, 5)], ids=['linear', 'entries'])
def test_loha_on_a_matrix(layer):
    frozen, new, f = adapted(layer, dict(type='LoHa', rank=2, alpha=6))
    close(new, frozen + 3 * (f['loha_B1'] @ f['loha_A1']) * (f['loha_B2'] @ f['loha_A2']))


@pytest.mark.parametrize('name', KERNELS)
def test_loha_keeps_the_axes_of_a_kernel(name):
    frozen, new, f = adapted(KERNELS[name](), dict(type='LoHa', rank=3, scale=0.7, layout='tucker'))
    one, two = (
        np.einsum(TUCKER[frozen.ndim], f[f'loha_T{i}'], f[f'loha_B{i}'], f[f'loha_A{i}'])
        for i in (1, 2)
    )
    close(new, frozen + 0.7 * one * two)


@pytest.mark.parametrize('name', KERNELS)
def test_loha_unfolds_a_kernel_in_the_channel_layout(name):
    frozen, new, f = adapted(KERNELS[name](), dict(type='LoHa', rank=2, layout='channel'))
    assert f['loha_A1'].shape == (2, prod(frozen.shape[1:]))
    delta = (f['loha_B1'] @ f['loha_A1']) * (f['loha_B2'] @ f['loha_A2'])
    close(new, frozen + delta.reshape(frozen.shape))


@pytest.mark.parametrize('rank', [1, 2, 64])
def test_lohas_parameters_in_closed_form(rank):
    for weight, spec in weights_of_all_layers():
        n, m, *kernel = spec.shape
        size = prod(kernel)
        r, s = min(rank, n), min(rank, m)
        flat = 2 * min(rank, n, m * size) * (n + m * size)
        kept = 2 * (r * s * size + r * n + s * m) if size > 1 else flat
        assert count(LoHa(rank=rank, layout='tucker').init(weight, spec)) == kept
        assert count(LoHa(rank=rank).init(weight, spec)) == flat


def test_loha_reaches_the_square_of_its_rank():
    layer = nn.Linear(30, 40).double()
    method = LoHa(rank=4)
    factors = init(layer, method)
    factors['loha_B2'].normal_()
    assert torch.linalg.matrix_rank(method.delta(factors, spec_of(layer))) == 16
    assert torch.linalg.matrix_rank(factors['loha_B2'] @ factors['loha_A2']) == 4


def test_loha_of_a_kernel_reaches_the_square_along_both_channel_modes():
    layer = nn.Conv2d(20, 30, 3).double()
    method = LoHa(rank=3, layout='tucker')
    factors = init(layer, method)
    factors['loha_B2'].normal_()
    delta = method.delta(factors, spec_of(layer))
    assert torch.linalg.matrix_rank(delta.flatten(1)) == 9
    assert torch.linalg.matrix_rank(delta.transpose(0, 1).flatten(1)) == 9


def test_loha_starts_as_lycoris_does():
    factors = init(nn.Conv2d(500, 400, 3), LoHa(rank=20, layout='tucker'))
    assert not factors['loha_B2'].any()
    for name, std in dict(loha_B1=0.1, loha_A1=1, loha_A2=1, loha_T1=0.1, loha_T2=0.1).items():
        assert abs(factors[name].std().item() / std - 1) < 0.05, name
        assert abs(factors[name].mean().item()) < 0.05 * std, name


def test_loha_starts_a_depthwise_kernels_number_at_1():
    factors = init(nn.Conv2d(6, 6, 3, groups=6), LoHa(rank=2, layout='tucker'))
    assert factors['loha_A1'].item() == factors['loha_A2'].item() == 1
    assert factors['loha_T1'].shape == (2, 1, 3, 3)


# LoHa and LoKr


@pytest.mark.parametrize('method', ['LoHa', 'LoKr'])
@pytest.mark.parametrize('layout', ['tucker', 'channel'])
def test_a_1x1_kernel_is_a_matrix(method, layout):
    method = mmpeft.METHODS.build(dict(type=method, rank=2, layout=layout))
    torch.manual_seed(1)
    kernel = init(nn.Conv2d(12, 20, 1), method)
    torch.manual_seed(1)
    matrix = init(nn.Linear(12, 20), method)
    assert {k: v.shape for k, v in kernel.items()} == {k: v.shape for k, v in matrix.items()}
    spec = spec_of(nn.Conv2d(12, 20, 1))
    randomized = {k: torch.randn_like(v) for k, v in kernel.items()}
    expected = method.delta(randomized, spec_of(nn.Linear(12, 20)))
    assert torch.equal(method.delta(randomized, spec)[..., 0, 0], expected)


@pytest.mark.parametrize('type', ['LoHa', 'LoKr'])
def test_the_scale_is_applied_once_when_merging(type):
    """LyCORIS' LoHa and LoKr square it."""
    layer = nn.Linear(12, 20).double()
    mmpeft.inject(layer, dict(type=type, rank=2, alpha=1))
    randomize(layer)
    adapter, frozen = layer.parametrizations.weight[0], layer.parametrizations.weight.original
    expected = frozen + 0.5 * adapter.method.delta(adapter.factors, adapter.spec)
    mmpeft.merge(layer)
    torch.testing.assert_close(layer.weight, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    'type, budget, rank, used',
    [
        ('LoHa', 7000, 4, 2 * (4 * 4 * 9 + 4 * 320) + 2 * 4 * 512),
        ('LoKr', 900, 5, 128 + 5 * 5 * 9 + 5 * 24 + 256 + 5 * 32),
    ],
)
def test_a_budget_gives_the_largest_rank_that_fits(type, budget, rank, used):
    model = nn.Sequential(nn.Conv2d(64, 256, 3), nn.Conv2d(256, 256, 1))
    summary = mmpeft.inject(model, dict(type=type, budget=budget, layout='tucker'))
    assert model[0].parametrizations.weight[0].method.rank == rank
    assert summary.adapters == used <= budget


@pytest.mark.parametrize('type, largest', [('LoHa', 16), ('LoKr', 5)])
def test_a_rank_that_no_weight_has_room_for(type, largest):
    with pytest.raises(UsageError, match=f'the largest possible is {largest}, at'):
        mmpeft.inject(nn.Linear(20, 16), dict(type=type, rank=17))
