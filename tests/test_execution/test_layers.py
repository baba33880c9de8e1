"""Layers change their class to compute faster, and take it back."""

import pytest
import torch
from torch import nn

import mmpeft
from mmpeft import execution
from mmpeft.execution.classes import Fast
from tests.cases import METHODS, randomize


@pytest.fixture
def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GELU(), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 4)
    )


def classes(network):
    return [type(module) for module in network.modules()]


def test_classes_come_back(network):
    before = classes(network)
    mmpeft.inject(network, METHODS['flora'])
    assert classes(network) != before
    mmpeft.merge(network)
    assert classes(network) == before


def test_plain_execution_changes_no_class_but_torchs_parametrize(network):
    before = {kind.__name__ for kind in classes(network)}
    mmpeft.inject(network, METHODS['flora'], execution='plain')
    names = {kind.__name__ for kind in classes(network)}
    torchs = {'ParametrizationList', 'ParametrizedLinear', 'ParametrizedConv2d', 'ModuleDict'}
    assert names - before == torchs | {'WeightAdapter'}
    assert not any(isinstance(m, Fast) for m in network.modules())


def test_layers_with_a_forward_of_their_own_are_left_unchanged():
    class Own(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    network = nn.Sequential(Own(4, 4), Own(4, 4))
    mmpeft.inject(network, METHODS['lora'], dict(include=['^0']))
    assert not execution.is_enabled(network[0])
    assert type(network[1]) is Own


@pytest.mark.parametrize('layout', [torch.jagged, torch.strided])
@pytest.mark.parametrize('name', ['lora', 'liera', 'ia3', 'dora'])
def test_nested_tensors_train_as_in_torch(name, layout):
    network = nn.Sequential(
        nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 8)
    ).double()
    mmpeft.inject(network, METHODS[name], dict(include=['^0', '^4']))
    randomize(network)
    parts = [torch.randn(n, 8, dtype=torch.float64) for n in (3, 2)]

    def train(wrap):
        network.zero_grad()
        total = sum(part.square().sum() for y in wrap(network) for part in y.unbind())
        total.backward()
        return [p.grad for p in network.parameters() if p.requires_grad]

    nested = train(lambda run: [run(torch.nested.nested_tensor(parts, layout=layout))])
    for found, expected in zip(nested, train(lambda run: map(run, parts)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
