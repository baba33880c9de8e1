"""Ranks of many weights within one budget."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.injection.distribution import distribute, falling
from mmpeft.injection.site import attached
from tests.networks import Net, Tied

COUNTS = st.integers(1, 9)


@st.composite
def weights(draw):
    """Sizes and gains by rank, and a budget that suffices for rank 1."""
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    sizes = [np.cumsum([draw(COUNTS) for _ in range(n)]).tolist() for n in lengths]
    gains = [[draw(st.integers(0, 9)) for _ in range(n)] for n in lengths]
    return sizes, gains, sum(own[0] for own in sizes) + draw(st.integers(0, 60))


@given(weights())
@settings(max_examples=60, deadline=None)
def test_no_rank_can_be_raised_within_the_budget(drawn):
    sizes, gains, budget = drawn
    ranks = distribute(budget, sizes, gains)
    used = sum(own[rank - 1] for own, rank in zip(sizes, ranks, strict=True))
    assert used <= budget and ranks == distribute(budget, sizes, gains)
    for own, rank in zip(sizes, ranks, strict=True):
        assert rank >= 1 and (rank == len(own) or used + own[rank] - own[rank - 1] > budget)


@given(weights(), st.lists(COUNTS, min_size=6, max_size=6))
@settings(max_examples=60, deadline=None)
def test_who_gains_more_gets_more(drawn, more):
    """A weight that gains more at each rank; and an equal one behind it."""
    sizes, gains, budget = drawn
    higher = [gain + extra for gain, extra in zip(gains[0], more, strict=False)]
    sizes, gains = [*sizes, sizes[0], sizes[0]], [*gains, higher, gains[0]]
    first, *_, better, same = distribute(budget + 2 * sizes[0][0], sizes, gains)
    assert better >= first >= same


@given(st.lists(st.integers(1, 9), min_size=2, max_size=8), COUNTS, st.integers(2, 5))
@settings(max_examples=60, deadline=None)
def test_equal_weights_have_equal_ranks_but_for_the_remainder(gains, cost, copies):
    sizes, gains = [[cost * n for n in range(1, len(gains) + 1)]] * copies, [gains] * copies
    for ranks in range(1, len(gains[0]) + 1):
        if gains[0][1:] == sorted(gains[0][1:], reverse=True):
            assert distribute(cost * ranks * copies, sizes, gains) == [ranks] * copies
        found = distribute(cost * (ranks * copies + 1), sizes, gains)
        assert found[0] - found[-1] <= 1 and found == sorted(found, reverse=True)


@given(weights())
@settings(max_examples=40, deadline=None)
def test_no_other_ranks_of_that_size_gain_more_where_gains_fall(drawn):
    """Against all combinations: the sum of what is gained, at costs of one parameter a rank."""
    _, gains, _ = drawn
    gains = [sorted(each, reverse=True) for each in gains][:3]
    sizes = [list(range(1, len(each) + 1)) for each in gains]
    for budget in range(len(gains), sum(map(len, gains)) + 1, 3):
        ranks = distribute(budget, sizes, gains)
        reached = sum(sum(each[:rank]) for each, rank in zip(gains, ranks, strict=True))
        choices = product(*(range(1, len(each) + 1) for each in gains))
        best = max(
            sum(sum(each[:rank]) for each, rank in zip(gains, choice, strict=True))
            for choice in choices
            if sum(choice) <= budget
        )
        assert reached == best


def test_a_gain_behind_a_rank_that_gains_nothing_is_seen():
    assert falling([1, 1, 2, 1], [0, 8, 2, 1]) == [4, 4, 1, 1]
    assert distribute(6, [[1, 2, 3, 4], [1, 2, 3, 4]], [[9, 0, 8, 0], [9, 3, 3, 3]]) == [3, 3]
    assert distribute(5, [[1, 2, 3, 4], [1, 2, 3, 4]], [[9, 0, 8, 0], [9, 3, 3, 3]]) == [3, 2]


def spectrum(model, method, value):
    """The same gains everywhere, for each weight that is adapted, up to rank 8."""
    mmpeft.inject(model, dict(method, rank=1))
    names = [row.name for row in mmpeft.summary(model).rows]
    mmpeft.remove(model)
    return {name: torch.full((8,), value, dtype=torch.float64) for name in names}


def rank_by_name(model):
    return {site.name: site.method.rank for site in attached(model)}


@pytest.mark.filterwarnings('ignore:.*adapters have more parameters')
def test_fixed_ranks_shares_and_the_budget_together():
    """Equal gains: the next rank goes where it takes the fewest parameters."""
    method = dict(type='LoRA')
    found = spectrum(Net(), method, 1.0)
    model = Net()
    found['backbone.1.out.weight'] *= 1000
    targets = dict(overrides={r'backbone\.0\.pw': dict(rank=2)}, max_share=0.5)
    summary = mmpeft.inject(model, dict(method, budget=2000), targets, sensitivity=found)
    ranks = rank_by_name(model)
    assert summary.adapters <= 2000
    assert ranks['backbone.0.pw.weight'] == 2
    out = 8 + 16 * 9  # parameters of one rank; half of the weight holds three
    assert ranks['backbone.1.out.weight'] == 8 * 16 * 9 // 2 // out == 3
    for row in summary.rows:
        assert row.adapter <= row.weight / 2 or ranks[row.name] in (1, 2)
    assert 'LoRA(rank=3)' in str(summary)
    assert model.peft[0].method.budget is None


@pytest.mark.filterwarnings('ignore:.*adapters have more parameters')
def test_an_adapter_is_no_larger_than_its_weight():
    model = Net()
    found = spectrum(model, dict(type='FLoRA'), 1.0)
    summary = mmpeft.inject(model, dict(type='FLoRA', budget=10**6), sensitivity=found)
    assert not summary.oversized and summary.adapters > 1000


def test_a_tied_weight_has_one_rank_and_counts_once():
    model = Tied()
    method, targets = dict(type='LoRA', budget=50), dict(kinds=('embedding', 'linear'))
    gains = torch.ones(6, dtype=torch.float64)
    found = {'embed.weight': gains, 'out.weight': gains}
    assert mmpeft.inject(model, method, targets, sensitivity=found).adapters == 45
    assert rank_by_name(model) == {'embed.weight': 3, 'out.weight': 3}


@pytest.mark.parametrize(
    'method, found, expected',
    [
        (dict(type='LoRA', rank=2), {}, 'leaves no rank open'),
        (dict(type='BitFit'), {}, 'leaves no rank open'),
        (dict(type='LoRA', budget='5k'), {'backbone.0.dw.weight': torch.ones(3)}, 'has no entry'),
    ],
)
def test_what_cannot_be_distributed(method, found, expected):
    model = Net()
    with pytest.raises(UsageError, match=expected):
        mmpeft.inject(model, method, sensitivity=found)
    assert not hasattr(model, 'peft')
