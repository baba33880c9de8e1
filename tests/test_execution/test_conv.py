"""Convolutions with thin updates: their derivatives, their geometry."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmpeft import execution
from mmpeft.execution.conv import TuckerConv
from mmpeft.injection.weights import weights_of
from mmpeft.methods.spec import ConvGeometry
from tests.cases import METHODS
from tests.comparing import assert_equal, plain, second_derivatives
from tests.test_execution.tables import LARGE, adapted

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


@pytest.mark.parametrize('way', [execution.MERGED, execution.BRANCH, execution.COMPOSED])
@pytest.mark.parametrize('name', ['lora_channel', 'flora'])
@pytest.mark.parametrize('case', ['kernel', 'same', 'patches', 'sequence', 'volume'])
def test_second_derivatives(case, name, way):
    model, x = adapted(LARGE[case], METHODS[name], way=way), LARGE[case].input()
    found = second_derivatives(model, x)
    with plain(model):
        assert_equal(found, second_derivatives(model, x), 1e-10)


@pytest.mark.parametrize(
    'branch, thin, down',
    [
        (False, True, False),
        (False, True, True),
        (True, True, True),
        (False, False, False),
        (False, False, True),
    ],
)
def test_gradients_by_finite_differences(branch, thin, down):
    torch.manual_seed(0)
    geometry = ConvGeometry((2, 1), ((1, 1), (0, 0)), 'zeros', (1, 1))
    function = TuckerConv(geometry, 0.5, branch, thin)
    shapes = [(1, 3, 4, 3), (4, 3, 3, 2), (4,), (4, 2), (2, 2 if down else 3, 3, 2), (2, 3)]
    x, weight, *others = (
        torch.randn(shape, dtype=torch.float64, requires_grad=i != 1)
        for i, shape in enumerate(shapes)
    )
    tensors = [x, weight, *others[:-1], others[-1] if down else None]
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


LAYERS = [
    nn.Conv1d(3, 4, 3, stride=2, padding=1),
    nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(0, 2), dilation=(2, 1)),
    nn.Conv2d(3, 4, (4, 3), padding='same'),
    nn.Conv2d(3, 4, 3, padding='valid'),
    nn.Conv2d(3, 4, 3, padding=2, padding_mode='circular'),
    nn.Conv2d(3, 4, 2, padding=1, padding_mode='reflect', stride=3),
    nn.Conv3d(3, 4, (1, 2, 3), padding=1),
]


@pytest.mark.parametrize('layer', LAYERS, ids=str)
def test_a_geometry_convolves_as_its_layer(layer):
    layer = layer.double()
    axes = len(layer.kernel_size)
    geometry = ConvGeometry.of(layer, dict(weights_of(layer))['weight'])
    for size in product([5, 8], repeat=axes):
        x = torch.randn(2, 3, *size, dtype=torch.float64)
        y = layer(x)
        assert torch.equal(geometry.convolve(x, layer.weight, layer.bias), y)
        padded, rest = geometry.padded(x)
        assert torch.equal(rest.convolve(padded, layer.weight, layer.bias), y)


def test_groups():
    x, weight = torch.randn(2, 4, 6, 6), torch.randn(6, 2, 3, 3)
    geometry = ConvGeometry((1, 1), ((1, 1), (1, 1)), 'zeros', (1, 1))
    y = F.conv2d(x, weight, padding=1, groups=2)
    assert torch.equal(geometry.convolve(x, weight, groups=2), y)
