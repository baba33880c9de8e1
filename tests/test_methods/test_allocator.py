"""Choices of the largest scores, runs that resume, and what all allocators share."""

import copy
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.injection.site import named_adapters
from mmpeft.methods.allocator import best, span
from mmpeft.methods.sparse import largest
from tests.allocating import (
    adapted_network,
    network,
    started,
    through_a_file,
    train,
    trainable,
)

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


def test_best_keeps_exactly_the_count_and_the_first_of_equals():
    scores = torch.tensor([3.0, 1, 3, 2, 3, float('nan'), 2])
    expected = {1: [0], 2: [0, 2], 3: [0, 2, 4], 4: [0, 2, 3, 4], 5: [0, 2, 3, 4, 6]}
    for count, places in expected.items():
        assert best(scores, count).nonzero().flatten().tolist() == places
    assert best(scores, 7).all()
    assert best(torch.zeros(50), 7).nonzero().flatten().tolist() == list(range(7))
    infinite = torch.tensor([0.0, float('inf'), float('-inf'), float('nan')])
    assert best(infinite, 3).tolist() == [True, True, True, False]


def test_best_is_the_top_of_a_stable_sort():
    for seed in range(20):
        scores = np.random.default_rng(seed).integers(0, 9, 200).astype(float)
        expected = np.sort(np.argsort(-scores, kind='stable')[:77])
        np.testing.assert_array_equal(largest(torch.tensor(scores), 77), expected)


def test_spans_are_steps_or_shares_of_the_run():
    assert [span(v, 60) for v in (0, 7, 0.0, 0.1, 0.5)] == [0, 7, 0, 6, 30]


RANKS = dict(type='AdaLoRA', rank=2, layout='loralib', warmup=10, settle=20, beta1=0.7, beta2=0.8)


@pytest.mark.parametrize(
    'config, overrides, words',
    [
        (RANKS, {}, 'exceed the 20 steps'),
        (RANKS, {'out': dict(warmup=3)}, 'warmup governs the whole run'),
        (dict(type='DiffPruning', project_at=30), {}, 'after the 20 steps'),
        (dict(type='FISH'), {'out': dict(samples=3)}, 'samples governs the whole run'),
    ],
)
def test_schedules_that_cannot_be_are_refused(config, overrides, words):
    model, _ = adapted_network(config, overrides=overrides)
    with pytest.raises(UsageError, match=words):
        mmpeft.allocate(model, torch.optim.SGD(trainable(model), 0.1), 20)


STOPS = (5, 12, 25, 30, 40, 50)
RUNS = dict(
    adalora=RANKS | dict(every=3),
    diff_pruning=dict(
        type='DiffPruning', density=0.1, project_at=30, structured=True, start=1.0, gate_speed=20.0
    ),
    fish=dict(type='FISH', density=0.1, samples=12),
)


@cache
def through(name):
    """States at each stop of a run that was not interrupted, and its end."""
    run, states = started(RUNS[name]), {}
    for start, stop in pairwise((0, *STOPS, 60)):
        train(*run[:2], range(start, stop))
        states[stop] = copy.deepcopy([part.state_dict() for part in run])
    return states


@pytest.mark.parametrize('name', RUNS)
@pytest.mark.parametrize('stop', STOPS)
def test_a_resumed_run_is_equal_to_the_last_bit(name, stop):
    states = through(name)
    resumed = started(RUNS[name], *through_a_file(states[stop]))
    train(*resumed[:2], range(stop, 60))
    assert [a.step for a in resumed[2].allocators] == [60]
    for key, value in states[60][0].items():
        assert torch.equal(resumed[0].state_dict()[key], value), key


@pytest.mark.parametrize('name', RUNS)
def test_states_are_copies(name):
    model, optimizer, allocation = started(RUNS[name])
    train(model, optimizer, range(5))
    state = allocation.state_dict()
    kept = copy.deepcopy(state)
    train(model, optimizer, range(5, 9))
    assert repr(state) == repr(kept)


@pytest.mark.parametrize('name', RUNS)
def test_training_lowers_the_loss(name):
    model, optimizer, allocation = started(RUNS[name])
    x, y = torch.randn(16, 3, 6, 6).double(), torch.randint(4, (16,))

    def loss():
        return nn.functional.cross_entropy(model(x), y)

    with torch.no_grad():
        before = loss().item()
    for _ in range(60):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    allocation.close()
    model.eval()
    with torch.no_grad():
        assert loss().item() < 0.95 * before


def test_two_methods_on_one_model_have_an_allocator_each():
    model = network()
    mmpeft.inject(model, RUNS['fish'], dict(include='out'))
    mmpeft.inject(model, RUNS['adalora'], dict(include=('conv', 'hidden')))
    optimizer = torch.optim.AdamW(trainable(model), lr=0.02)
    allocation = mmpeft.allocate(model, optimizer, 60)
    assert {type(a).__name__ for a in allocation.allocators} == {'FisherMask', 'RankAllocator'}
    train(model, optimizer, range(60))
    lambdas = [a.lora_E for a in named_adapters(model).values() if hasattr(a, 'lora_E')]
    assert sum(int(value.count_nonzero()) for value in lambdas) == 3 * 2 + 2
