"""Convolutions with groups, whose input may be computed again."""

import copy

import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.execution.grouped import GroupedConv
from tests.cases import METHODS, randomize
from tests.comparing import assert_as_plain, assert_equal, plain, second_derivatives
from tests.test_execution.tables import LARGE, adapted, geometry_of
from tests.test_execution.test_recompute import kept_bytes


@pytest.mark.parametrize(
    'layer, is_fast',
    [
        (nn.Conv2d(3, 3, (5, 2), padding=(2, 0), groups=3), True),
        (nn.Conv2d(3, 3, (3, 2), padding=(2, 0), groups=3), False),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), False),
    ],
)
@pytest.mark.parametrize('channels_last', [False, True])
def test_derivatives_by_finite_differences(channels_last, layer, is_fast):
    layer.double()
    x = torch.randn(2, layer.in_channels, 4, 4, dtype=torch.float64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    tensors = [x.requires_grad_(), layer.weight, layer.bias]
    function = GroupedConv(geometry_of(layer), layer.groups, is_fast)
    assert torch.equal(function(*tensors), layer(x))
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


def test_second_derivatives_of_a_layer():
    case = LARGE['large_depthwise']
    model, x = adapted(case, METHODS['flora']), case.input()
    found = second_derivatives(model, x)
    with plain(model):
        assert_equal(found, second_derivatives(model, x), 1e-10)


@pytest.mark.parametrize(
    'layer',
    [
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.Conv2d(16, 16, 5, padding=2, groups=16),
        nn.Conv2d(16, 16, 3, stride=2, groups=16),
        nn.Conv2d(16, 24, 3, padding=1, groups=4),
        nn.Conv2d(16, 24, 3, padding=1),
        nn.Conv2d(16, 24, 1),
    ],
    ids=['depthwise', 'wide', 'strided', 'groups', 'full', 'pointwise'],
)
@pytest.mark.parametrize('name', ['flora', 'lora_channel'])
def test_an_input_that_costs_little_is_computed_again(layer, name):
    kept, x = {}, torch.randn(2, 16, 12, 13, dtype=torch.float64, requires_grad=True)
    for way in ('auto', 'plain'):
        torch.manual_seed(0)
        model = nn.Sequential(nn.SiLU(), copy.deepcopy(layer)).double()
        mmpeft.inject(model, METHODS[name], execution=way)
        randomize(model)
        assert_as_plain(model, x.detach())
        _, kept[way] = kept_bytes(model, x)
    assert kept['plain'] - kept['auto'] >= x.nbytes
