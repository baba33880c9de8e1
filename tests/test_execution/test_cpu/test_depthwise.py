"""The depthwise kernel's gradient as a convolution."""

import pytest
import torch
from torch import nn

from mmpeft.execution.cpu.depthwise import kernel_gradient, pays
from tests.test_execution.tables import geometry_of


@pytest.mark.parametrize('kernel, padding', [((3, 3), (1, 1)), ((5, 2), (0, 3)), ((1, 4), (0, 0))])
def test_the_gradient_is_torchs(kernel, padding):
    x = torch.randn(2, 5, 7, 8, dtype=torch.float64)
    conv = nn.Conv2d(5, 5, kernel, padding=padding, groups=5).double()
    y = conv(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    found = kernel_gradient(x, dy, conv.weight.shape, padding)
    assert found.shape == conv.weight.shape
    assert (found - conv.weight.grad).abs().max() < 1e-12


@pytest.mark.parametrize(
    'layer, size',
    [
        (nn.Conv2d(8, 8, 5, stride=2, groups=8), 32),
        (nn.Conv2d(8, 8, 5, dilation=2, groups=8), 32),
        (nn.Conv2d(8, 16, 5, groups=8), 32),
        (nn.Conv2d(8, 8, 5, groups=8), 8),
    ],
)
def test_other_layers_and_small_maps_are_left_to_torch(layer, size):
    assert not pays(layer, geometry_of(layer), torch.randn(1, 8, size, size))


def test_other_devices_are_left_to_torch():
    layer = nn.Conv2d(8, 8, 5, groups=8)
    assert pays(layer, geometry_of(layer), torch.empty(1, 8, 32, 32))
    assert not pays(layer, geometry_of(layer), torch.empty(1, 8, 32, 32, device='meta'))


def test_small_kernels_are_left_to_torch():
    layer = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    assert not pays(layer, geometry_of(layer), torch.empty(1, 8, 32, 32))
