"""Products by oneDNN, and the frozen layers that use them."""

import pytest
import torch
from torch import nn

from mmpeft.execution.cpu import onednn
from mmpeft.execution.layers import disable, enable_frozen


@pytest.fixture(autouse=True)
def on_wide_units(monkeypatch):
    """As on a processor with AVX-512, where oneDNN is the faster library."""
    monkeypatch.setattr(onednn, 'IS_FASTER', True)


@pytest.mark.parametrize('bias', [False, True])
def test_a_frozen_layer_and_its_derivatives(bias):
    layer = nn.Linear(64, 48, bias=bias).requires_grad_(False)
    x = torch.randn(16, 64, 64, requires_grad=True)

    def derivatives():
        y = layer(x)
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        return y.detach(), first.detach(), second

    expected = derivatives()
    enable_frozen(layer)
    assert layer(x).grad_fn.name() == 'FrozenLinearBackward'
    found = derivatives()
    disable(layer)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() < 1e-5 * other.norm()


def test_outputs_of_a_frozen_layer_may_be_changed_in_place():
    layer = nn.Linear(64, 48).requires_grad_(False)
    enable_frozen(layer)
    layer(torch.randn(1024, 64, requires_grad=True)).relu_().sum().backward()


def test_it_is_left_to_torch_elsewhere(monkeypatch):
    large = torch.empty(4096, 1024)
    assert not onednn.pays(large.double(), large.double())
    assert not onednn.pays(large.bfloat16(), large.bfloat16())
    assert not onednn.pays(large.to('meta'), large.to('meta'))
    assert not onednn.pays(large[:2], large[:2])
    assert onednn.pays(large, large)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not onednn.pays(large, large)
    monkeypatch.setattr(onednn, 'IS_FASTER', False)
    assert not onednn.pays(large, large)
