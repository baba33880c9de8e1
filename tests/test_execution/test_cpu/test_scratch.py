"""Memory that is used again: whose it is, and that no result stays in it."""

import threading

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import mmpeft
from mmpeft.execution.cpu import scratch
from mmpeft.methods import ActivationMethod
from tests.cases import METHODS, randomize
from tests.comparing import results

OF_WEIGHTS = [
    name
    for name, config in METHODS.items()
    if not issubclass(mmpeft.METHODS.get(config['type']), ActivationMethod)
]
SHAPE = torch.Size((8, 16))


def memory(like=None, use=scratch.WEIGHT, dtype=torch.float32, shape=SHAPE):
    return scratch.memory(use, shape, dtype, torch.empty(1) if like is None else like)


def test_it_is_used_again():
    first = memory()
    assert first.shape == SHAPE and first.dtype == torch.float32
    again = memory(dtype=torch.float64, shape=torch.Size((4, 16)))
    assert again.data_ptr() == memory().data_ptr() and again.dtype == torch.float64
    assert memory(use=scratch.GRADIENT).data_ptr() != memory().data_ptr()
    larger = memory(shape=torch.Size((1024, 1024)))
    assert larger.numel() == 2**20 and memory().data_ptr() == larger.data_ptr()


def test_each_thread_has_its_own():
    found = []
    thread = threading.Thread(target=lambda: found.append(memory().data_ptr()))
    held = memory()
    thread.start()
    thread.join()
    assert found and found != [held.data_ptr()]


def test_other_tensors_have_none():
    assert memory(torch.empty(1, device='meta')) is None
    with FakeTensorMode():
        assert memory(torch.empty(1)) is None


def test_after_inference_mode():
    """Which makes tensors that training may not use."""
    scratch._held.__dict__.clear()
    model = nn.Sequential(nn.Linear(16, 16))
    mmpeft.inject(model, METHODS['liera'])
    x = torch.randn(4, 16)
    with torch.inference_mode():
        model(x)
    model(x.requires_grad_()).sum().backward()


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('method', OF_WEIGHTS)
def test_no_result_stays_in_it(method, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(64, 32))
    mmpeft.inject(model.to(dtype), METHODS[method])
    randomize(model, 0.05)
    x = torch.randn(2, 4, 4, 4, dtype=dtype)
    with torch.no_grad():
        evaluated = model(x)
    found = results(model, x) | dict(evaluated=evaluated)
    expected = {name: t.clone() for name, t in found.items() if t is not None}
    model.zero_grad(set_to_none=True)  # so that the next ones take other memory
    with torch.no_grad():
        model(2 * x)
    results(model, 2 * x)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    held = {t.data_ptr() for t in scratch._held.__dict__.values()}
    assert held.isdisjoint(t.data_ptr() for t in found.values() if t is not None)
