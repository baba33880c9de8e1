"""The depthwise kernel's gradient as a convolution."""

import pytest
import torch
from torch import nn

from mmpeft.execution.cpu.depthwise import DepthwiseConv, kernel_gradient, pays
from mmpeft.execution.recompute import tag_for_recompute
from mmpeft.injection.weights import weights_of
from mmpeft.methods.spec import ConvGeometry
from tests.cases import METHODS
from tests.comparing import assert_equal, plain, second_derivatives
from tests.test_execution.tables import LARGE, adapted


def geometry_of(layer):
    return ConvGeometry.of(layer, dict(weights_of(layer))['weight'])


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


@pytest.mark.parametrize('kernel', [(3, 2), (5, 2)], ids=['gradient of torch', 'our own'])
@pytest.mark.parametrize('channels_last', [False, True])
def test_derivatives_by_finite_differences(channels_last, kernel):
    layer = nn.Conv2d(3, 3, kernel, padding=(2, 0), groups=3).double()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    tensors = [x.requires_grad_(), layer.weight, layer.bias]
    assert torch.autograd.gradcheck(DepthwiseConv(geometry_of(layer)), tensors)
    assert torch.autograd.gradgradcheck(DepthwiseConv(geometry_of(layer)), tensors)


def test_second_derivatives_of_a_layer():
    case = LARGE['large_depthwise']
    model, x = adapted(case, METHODS['flora']), case.input()
    found = second_derivatives(model, x)
    with plain(model):
        assert_equal(found, second_derivatives(model, x), 1e-10)


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


def test_small_kernels_are_left_to_torch_unless_it_would_keep_more():
    layer = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    x = torch.randn(1, 8, 32, 32, requires_grad=True)
    assert not pays(layer, geometry_of(layer), x)
    assert pays(layer, geometry_of(layer), tag_for_recompute(x.sin(), torch.sin, x))
