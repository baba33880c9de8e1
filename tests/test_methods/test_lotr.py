"""LoTR: factors that all weights of one shape share."""

import copy

import numpy as np
import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.injection.site import adapter_parameters
from mmpeft.methods.lotr import LoTR
from tests.adapting import (
    IMAGES,
    EqualBlocks,
    adapted,
    adapter_at,
    close,
    spec_of,
    trained_steps,
    weights_of_all_layers,
)
from tests.cases import KINDS, randomize

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


@pytest.fixture
def lotr():
    model = EqualBlocks()
    mmpeft.inject(model, dict(type='LoTR', rank=4))
    return model


# Parameters of LoTR(rank=r) on Net: the pair of factors of each shape, and a core for each weight.
def net_parameters(r):
    stem = 8 * min(r, 8) + 3 * min(r, 3) + min(r, 8) * min(r, 3)
    depthwise = 8 * min(r, 8) + 1 + 2 * min(r, 8) * 9
    linear = 2 * (8 * min(r, 8) + 12 * r) + 4 * min(r, 8) * r
    return stem + depthwise + linear


def test_lotr_is_tucker_2(layer):
    frozen, new, f = adapted(layer, dict(type='LoTR', rank=3, scale=0.7))
    core = f['core'].reshape(*f['core'].shape[:2], -1)
    expected = np.einsum('ia,abk,jb->ijk', f['lotr_A'], core, f['lotr_B'])
    close(new, frozen + 0.7 * expected.reshape(frozen.shape))


@pytest.mark.parametrize('rank', [2, 64])
def test_lotrs_parameters_in_closed_form(rank):
    for weight, spec in weights_of_all_layers():
        factors = LoTR(rank=rank).init(weight, spec)
        n, m, *kernel = spec.shape
        r, s = min(rank, n), min(rank, m)
        assert factors['core'].shape == (r, s, *kernel)
        expected = n * r + m * s + r * s * int(np.prod(kernel))
        assert sum(f.numel() for f in factors.values()) == expected


def test_lotr_starts_with_a_zero_core_and_gaussian_factors():
    layer = nn.Linear(400, 300)
    for config, std in ((dict(), 50**-0.5), (dict(init_std=0.02), 0.02)):
        factors = LoTR(rank=50, **config).init(layer.weight.detach(), spec_of(layer))
        assert not factors['core'].any()
        for name in ('lotr_A', 'lotr_B'):
            assert abs(factors[name].std().item() / std - 1) < 0.03
    layer = nn.Conv2d(8, 8, 3, groups=8)
    factors = LoTR(rank=4).init(layer.weight.detach(), spec_of(layer))
    assert torch.equal(factors['lotr_B'], torch.ones(1, 1))


def test_an_adam_step_on_lotrs_core_moves_weights_alike_at_every_rank():
    layer = nn.Linear(300, 200)
    moved = []
    for rank in (4, 32, 128):
        method, spec = LoTR(rank=rank), spec_of(layer)
        factors = method.init(layer.weight.detach(), spec)
        factors['core'] = torch.randn(rank, rank).sign()
        moved.append(method.delta(factors, spec).std().item())
    assert max(moved) / min(moved) < 1.3 and 0.8 < moved[-1] < 1.2


def test_weights_of_one_shape_share_lotrs_factors_and_have_their_own_core(lotr):
    for holder in (lotr, copy.deepcopy(lotr)):
        for one, two in (('up.0', 'up.1'), ('down.0', 'down.1'), ('depthwise.0', 'depthwise.1')):
            first, second = adapter_at(holder, one), adapter_at(holder, two)
            assert first.lotr_A is second.lotr_A and first.lotr_B is second.lotr_B
            assert first.core is not second.core
        assert adapter_at(holder, 'up.0').lotr_A is not adapter_at(holder, 'down.0').lotr_A
    assert adapter_at(copy.deepcopy(lotr), 'up.0').lotr_A is not adapter_at(lotr, 'up.0').lotr_A


def test_lotr_does_not_share_between_roles_or_arguments():
    model = nn.ModuleList(
        [nn.Linear(6, 6), nn.Embedding(6, 6), nn.Linear(6, 6), nn.Linear(6, 6).double()]
    )
    overrides = {'^2.weight': dict(scale=2.0)}
    mmpeft.inject(model, dict(type='LoTR', rank=2), dict(kinds=KINDS, overrides=overrides))
    assert len({id(adapter_at(model, str(i)).lotr_A) for i in range(4)}) == 4


def test_lotrs_shared_factors_count_once(lotr):
    summary = mmpeft.summary(lotr)
    assert summary.adapters == net_parameters(4)
    assert sum(p.numel() for p in adapter_parameters(lotr)) == net_parameters(4)
    assert sum(p.numel() for p in lotr.parameters() if p.requires_grad) == net_parameters(4)
    rows = {row.name: row.adapter for row in summary.rows}
    assert rows['up.0.weight'] - rows['up.1.weight'] == (8 + 12) * 4
    assert rows['up.1.weight'] == 4 * 4


def test_lotrs_gradients_add_up_over_the_weights_that_share(lotr):
    randomize(lotr)
    x = torch.randn(IMAGES)
    lotr(x).square().sum().backward()
    shared = adapter_at(lotr, 'up.0').lotr_A.grad

    apart = copy.deepcopy(lotr)
    apart.zero_grad()
    second = adapter_at(apart, 'up.1')
    second.lotr_A = nn.Parameter(second.lotr_A.detach().clone())
    apart(x).square().sum().backward()
    torch.testing.assert_close(shared, adapter_at(apart, 'up.0').lotr_A.grad + second.lotr_A.grad)
    assert second.lotr_A.grad.any()


def test_optimizers_see_lotrs_shared_factors_once(lotr):
    expected = sorted(id(p) for p in adapter_parameters(lotr))
    assert len(set(expected)) == len(expected) == 7 + 2 * 4
    adamw = dict(type='AdamW', lr=0.1)
    for paramwise in (None, dict(norm_decay_mult=0.0, bypass_duplicate=True)):
        config = dict(type='OptimWrapper', optimizer=adamw, paramwise_cfg=paramwise)
        if paramwise:
            config['optimizer'] = adamw | dict(weight_decay=0.05)
        groups = build_optim_wrapper(lotr, config).param_groups
        stepped = [p for group in groups for p in group['params'] if p.requires_grad]
        assert sorted(map(id, stepped)) == expected


def test_lotr_is_saved_once_and_loads_back(tmp_path):
    plain = EqualBlocks()
    lotr = copy.deepcopy(plain)
    mmpeft.inject(lotr, dict(type='LoTR', rank=4))
    trained_steps(lotr, 3)
    state = mmpeft.adapter_state_dict(lotr)
    assert sum(key.endswith('lotr_A') for key in state) == 4
    assert sum(key.endswith('core') for key in state) == 7
    assert sum(value.numel() for value in state.values()) == net_parameters(4)
    path = mmpeft.save_adapter(lotr, tmp_path / 'lotr.safetensors')
    x = torch.randn(IMAGES)
    again = copy.deepcopy(plain)
    mmpeft.inject(again, dict(type='LoTR', rank=4))
    for model in (plain, again):
        mmpeft.load_adapter(model, path)
        assert adapter_at(model, 'up.0').lotr_A is adapter_at(model, 'up.1').lotr_A
        assert torch.equal(model(x), lotr(x))


@pytest.mark.parametrize('rank', [2, 5, 8, 11])
def test_a_budget_buys_lotr_the_largest_rank(rank):
    assert net_parameters(rank) < net_parameters(rank + 1)
    for budget in (net_parameters(rank), net_parameters(rank + 1) - 1):
        model = EqualBlocks()
        summary = mmpeft.inject(model, dict(type='LoTR', budget=budget))
        assert model.peft[0].method == LoTR(rank=rank)
        assert summary.adapters == net_parameters(rank)
    with pytest.raises(UsageError, match=f'needs {net_parameters(1)} parameters at rank 1'):
        mmpeft.inject(EqualBlocks(), dict(type='LoTR', budget=net_parameters(1) - 1))


def test_lotrs_rank_is_within_the_largest_mode():
    with pytest.raises(UsageError, match='largest possible is 12'):
        mmpeft.inject(EqualBlocks(), dict(type='LoTR', rank=13))
