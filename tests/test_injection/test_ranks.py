"""Budgets, caps and checks of ranks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.injection.ranks import most_within, parse_count
from mmpeft.methods import Adapter
from tests.networks import Net

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


def adapted(model):
    return [
        name.split('.parametrizations')[0]
        for name, module in model.named_modules()
        if isinstance(module, Adapter)
    ]


def test_a_rank_for_every_mode_must_fit_every_weight():
    model = Net()
    with pytest.raises(UsageError, match=r'rank=\(2, 2, 2\) does not fit a weight of shape'):
        mmpeft.inject(model, dict(type='FLoRA', rank=(2, 2, 2)))
    assert all(p.requires_grad for p in model.parameters()) and not adapted(model)


@given(budget=st.integers(600, 60_000), layout=st.sampled_from(['loralib', 'channel']))
@settings(max_examples=12, deadline=None)
def test_a_budget_gives_the_largest_rank_that_fits(budget, layout):
    with torch.device('meta'):
        model = Net()

    def size(rank):
        used = mmpeft.inject(model, dict(type='LoRA', rank=rank, layout=layout)).adapters
        mmpeft.remove(model)
        return used

    if size(1) > budget:
        with pytest.raises(UsageError, match='is too small'):
            mmpeft.inject(model, dict(type='LoRA', budget=budget, layout=layout))
        return
    summary = mmpeft.inject(model, dict(type='LoRA', budget=budget, layout=layout))
    rank = model.peft[0].method.rank
    mmpeft.remove(model)
    assert summary.adapters == size(rank) <= budget
    assert rank == 16 or size(rank + 1) > budget


@given(st.lists(st.integers(0, 60), min_size=1, max_size=20), st.integers(-5, 70))
def test_most_within(sizes, limit):
    for grows, by_rank in ((True, sorted(sizes)), (False, sizes)):
        rank = most_within(limit, [0, *by_rank].__getitem__, len(by_rank), grows)
        fitting = [(n, r) for r, n in enumerate(by_rank, 1) if n <= limit]
        assert rank == (max(fitting)[1] if fitting else None)


@pytest.mark.parametrize('budget, rank, used', [(9000, 1, 8320), (3000, 3, 2948), (1000, 12, 912)])
def test_a_budget_of_randlora_whose_parameters_fall_with_the_rank(budget, rank, used):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    summary = mmpeft.inject(model, dict(type='RandLoRA', budget=budget))
    assert (model.peft[0].method.rank, summary.adapters) == (rank, used)
    mmpeft.remove(model)
    with pytest.raises(UsageError, match='budget=200 is too small: RandLoRA .* at rank 64'):
        mmpeft.inject(model, dict(type='RandLoRA', budget=200))


@pytest.mark.parametrize('type', ['RandLoRA', 'RepAdapter'])
@pytest.mark.parametrize('share', [0.04, 0.1, 0.3])
def test_a_share_of_methods_whose_parameters_do_not_grow_with_the_rank(type, share):
    def size(rank):
        used = mmpeft.inject(layers, dict(type=type, rank=rank)).adapters
        mmpeft.remove(layers)
        return used

    layers = nn.Sequential(nn.Linear(64, 64))
    expected = max(n for n in map(size, range(1, 65)) if n <= share * 4096)
    rank = 1 if type == 'RandLoRA' else 64
    method = dict(type=type, rank=rank)
    assert mmpeft.inject(layers, method, targets=dict(max_share=share)).adapters == expected


@pytest.mark.parametrize(
    'text, count', [('12.9M', 12_900_000), ('300k', 300_000), (7, 7), ('1_000', 1000), ('2G', 2e9)]
)
def test_counts_with_units(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize('text', ['', 'many', '-3', 0, 'M', '1.2.3k'])
def test_wrong_counts(text):
    with pytest.raises(UsageError, match='is not a number of parameters'):
        parse_count(text)


def test_a_rank_that_no_mode_allows():
    with pytest.raises(UsageError, match="rank=40.*largest possible is 16, at 'backbone"):
        mmpeft.inject(Net(), dict(type='FLoRA', rank=40))


def test_an_oversized_adapter_is_warned_of_and_can_be_capped():
    model = Net()
    method = dict(type='LoRA', rank=4, layout='loralib')
    with pytest.warns(UserWarning, match=r'3 of 7 adapters .*backbone\.\d\.dw'):
        mmpeft.inject(model, method)
    mmpeft.remove(model)
    summary = mmpeft.inject(model, method, dict(max_share=0.5))
    for row in summary.rows:
        rank_1 = 'rank=1,' in row.method or 'rank=1)' in row.method
        assert row.adapter <= 0.5 * row.weight or rank_1
    assert len({row.method for row in summary.rows}) > 1


def test_a_cap_on_ranks_needs_ranks():
    with pytest.raises(UsageError, match='max_share lowers ranks, and OFT has none'):
        mmpeft.inject(Net(), dict(type='OFT'), dict(max_share=0.5))


def test_a_budget_is_not_one_weights():
    with pytest.raises(UsageError, match=r"overrides\['dw'\]: a budget is one for all adapters"):
        mmpeft.inject(Net(), dict(type='LoRA', budget=3000), dict(overrides=dict(dw={'budget': 9})))
