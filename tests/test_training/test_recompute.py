"""Reentrant checkpointing behind a frozen stem."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import mmpeft
from mmpeft.injection.site import adapter_parameters
from mmpeft.training.recompute import let_inputs_require_grad, recomputed_modules


class Recomputed(nn.Module):
    """A block of mmdet's kind: reentrant checkpointing of what is inside."""

    with_cp = True

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return checkpoint(self.fc, x, use_reentrant=True)


def test_gradients_reach_the_adapters_of_recomputed_modules():
    model = nn.Sequential(nn.Linear(4, 4), Recomputed())
    mmpeft.inject(model, dict(type='BitFit'), dict(include='fc'))
    x = torch.randn(2, 4)
    with pytest.warns(UserWarning, match='None of the inputs have requires_grad=True'):
        assert not model(x).requires_grad
    handles = [let_inputs_require_grad(module) for module in recomputed_modules(model)]
    model(x).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in adapter_parameters(model))
    for handle in handles:
        handle.remove()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_inputs_that_require_a_gradient_are_unchanged():
    given = []
    layer = nn.Linear(3, 3)
    let_inputs_require_grad(layer)
    layer.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    trained, frozen, index = torch.randn(1, 3, requires_grad=True), torch.randn(1, 3), None
    layer(trained)
    layer(frozen)
    with torch.no_grad():
        layer(frozen)
    assert given[0] is trained and given[2] is frozen
    assert given[1].requires_grad and torch.equal(given[1], frozen) and not frozen.requires_grad
    assert index is None


def test_the_innermost_modules_and_those_that_are_named():
    inner = Recomputed()
    outer = nn.Sequential(inner, nn.Linear(4, 4))
    outer.with_cp = True
    model = nn.Sequential(outer, nn.Linear(4, 4))
    assert recomputed_modules(model) == [inner]
    assert recomputed_modules(model, '1') == [inner, model[1]]
    assert recomputed_modules(model, ['1', '0.1']) == [inner, model[1], outer[1]]
