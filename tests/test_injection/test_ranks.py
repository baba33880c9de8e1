"""Budgets, caps and checks of ranks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.injection.ranks import largest, parse_count
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


@given(st.integers(0, 60), st.integers(0, 60), st.integers(-5, 70))
def test_bisection(low, span, limit):
    high = low + span
    expected = max([low, *(n for n in range(low, high + 1) if n <= limit)])
    assert largest(lambda n: n <= limit, low, high) == expected


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
