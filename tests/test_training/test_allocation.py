"""Allocators are called around every step of the optimizer, and stop with it."""

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import mmpeft
from mmpeft.errors import UsageError
from tests.allocating import adapted_network, loss_of, trainable

ADALORA = dict(type='AdaLoRA', rank=2, warmup=2, settle=5, every=2, orthogonality=0.0)

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


def test_allocators_do_not_run_twice():
    model, optimizer = adapted()
    first = mmpeft.monitor(model, optimizer, steps=10)
    for start in (mmpeft.monitor, mmpeft.allocate):
        with pytest.raises(UsageError, match='run already'):
            start(model, optimizer, steps=10)
    first.detach()
    mmpeft.allocate(model, optimizer, steps=10).close()
    with pytest.raises(UsageError, match='number of optimizer steps'):
        mmpeft.monitor(model, optimizer, steps=0)


def test_without_allocators_nothing_is_called():
    model = nn.Linear(4, 4)
    mmpeft.inject(model, dict(type='LoRA', rank=1))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    allocation = mmpeft.allocate(model, optimizer, steps=3)
    assert not allocation.allocators and allocation.state_dict() == []


def fisher(losses, scaler=None):
    """What FISH keeps after batches; a loss of None is computed and thrown away."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 3))
    mmpeft.inject(model, dict(type='FISH', samples=2, density=0.1))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    generator = torch.Generator().manual_seed(1)
    batches = torch.randn(4, 8, 6, generator=generator)
    with mmpeft.monitor(model, optimizer, 4, nonfinite_iters=10):
        for scale, batch in losses:
            optimizer.zero_grad()
            loss = (scale or 100.0) * model(batches[batch]).square().sum()
            (scaler.scale(loss) if scaler else loss).backward()
            if scaler and scale:
                scaler.step(optimizer)
                scaler.update(4.0)
            elif scale:
                optimizer.step()
    return [p.clone() for name, p in model.state_dict().items() if name.endswith('index')]


@pytest.mark.filterwarnings('ignore')
def test_only_what_reaches_a_step_is_counted():
    expected = fisher([(1.0, 0), (1.0, 1), (1.0, 2), (1.0, 3)])
    thrown = fisher([(None, 3), (1.0, 0), (None, 2), (1.0, 1), (1.0, 2), (1.0, 3)])
    scaler = torch.amp.GradScaler('cpu', init_scale=4.0)
    skipped = fisher([(torch.inf, 3), (1.0, 0), (torch.inf, 2), (1.0, 1), (1.0, 2)], scaler)
    for found in (thrown, skipped):
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_filling_an_optimizers_state_is_no_step():
    model, _ = adapted_network(ADALORA)
    optimizer = torch.optim.AdamW(trainable(model), 0.02)
    allocation = mmpeft.allocate(model, optimizer, 20)
    get_optimizer_state_dict(model, optimizer)
    assert allocation.allocators[0].step == 0
    loss_of(model, 0).backward()
    optimizer.step()
    assert allocation.allocators[0].step == 1
