"""Allocators are called around every step of the optimizer, and stop with it."""

import pytest
import torch
from torch import nn

import mmpeft

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')
METHODS = (
    dict(type='AdaLoRA', rank=2, init_rank=3),
    dict(type='FISH', density=0.1),
    dict(type='LoRA', rank=1),
)


def adapted():
    """A model of two methods with allocators and one without, and its optimizer."""
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in METHODS))
    for place, method in enumerate(METHODS):
        mmpeft.inject(model, method, dict(module=str(place)))
    parameters = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.SGD(parameters, 0.1)


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.ones(2, 8)).square().mean().backward()
    optimizer.step()


def test_one_allocator_for_each_method_follows_the_optimizer():
    model, optimizer = adapted()
    allocation = mmpeft.allocate(model, optimizer, steps=10)
    assert len(allocation.allocators) == 2
    for _ in range(3):
        step(model, optimizer)
    assert [allocator.step for allocator in allocation.allocators] == [3, 3]
    state = allocation.state_dict()
    allocation.close()
    step(model, optimizer)
    assert [allocator.step for allocator in allocation.allocators] == [3, 3]
    resumed = mmpeft.allocate(*adapted(), steps=10)
    resumed.load_state_dict(state)
    assert [allocator.step for allocator in resumed.allocators] == [3, 3]
    resumed.close()


def test_without_allocators_nothing_is_called():
    model = nn.Linear(4, 4)
    mmpeft.inject(model, dict(type='LoRA', rank=1))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    allocation = mmpeft.allocate(model, optimizer, steps=3)
    assert not allocation.allocators and allocation.state_dict() == []
