"""Layers change their class to compute faster, and take it back."""

import pytest
from torch import nn

import mmpeft
from mmpeft import execution
from mmpeft.execution.classes import Fast
from tests.cases import METHODS


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
