"""Every execution against the plain parametrized form: the same outputs and gradients."""

import copy

import pytest
import torch
from torch import nn

import mmpeft
from mmpeft import execution
from mmpeft.methods import ActivationMethod
from mmpeft.weights import weights_of
from tests.cases import KINDS, LAYERS, METHODS, Layer, randomize

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')

# Sizes at which every way is taken, beside those of the common table.
LARGE = dict(
    linear=Layer(lambda: nn.Linear(20, 12), (5, 7, 20)),
    linear_without_bias=Layer(lambda: nn.Linear(12, 20, bias=False), (3, 12)),
    pointwise=Layer(lambda: nn.Conv2d(10, 8, 1), (2, 10, 6, 5)),
    kernel=Layer(lambda: nn.Conv2d(8, 10, 3, stride=2, padding=1, dilation=2), (2, 8, 13, 12)),
    pointwise_strided=Layer(lambda: nn.Conv2d(8, 6, 1, stride=2, padding=1), (2, 8, 7, 6)),
    patches=Layer(lambda: nn.Conv2d(6, 8, 2, stride=2), (2, 6, 8, 8)),
    sequence=Layer(lambda: nn.Conv1d(8, 6, 5, padding=2, bias=False), (3, 8, 11)),
    volume=Layer(lambda: nn.Conv3d(4, 6, 3, padding=(1, 0, 2)), (1, 4, 5, 5, 5)),
    depthwise=Layer(lambda: nn.Conv2d(16, 16, 7, padding=3, groups=16), (2, 16, 12, 13)),
    depthwise_wide=Layer(
        lambda: nn.Conv2d(24, 24, (3, 5), padding=(2, 1), groups=24), (1, 24, 14, 14)
    ),
)
TABLE = {f'{name}': layer for name, layer in LAYERS.items()} | {
    f'large_{name}': layer for name, layer in LARGE.items()
}


def weight_methods():
    built = {name: mmpeft.METHODS.build(config) for name, config in METHODS.items()}
    spec = dict(weights_of(nn.Linear(1, 1)))['weight']
    weight = [n for n, m in built.items() if m.adapts and not isinstance(m, ActivationMethod)]
    return [n for n in weight if built[n].accepts(spec)]


@pytest.fixture(params=TABLE)
def layer(request):
    return TABLE[request.param]


@pytest.fixture(params=weight_methods())
def config(request):
    return METHODS[request.param]


def pair(layer, config, dtype=torch.float64):
    """The same adapted layer, executed and plain."""
    model = layer.build(dtype)
    mmpeft.inject(model, config, dict(kinds=KINDS))
    randomize(model)
    plain = copy.deepcopy(model)
    for module in plain.modules():
        execution.disable(module)
    return model, plain


def results(model, x, seed=1):
    """Output, and gradients of the input and of all that trains."""
    if x.is_floating_point():
        x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    torch.manual_seed(seed)
    y = model(x)
    torch.manual_seed(2)
    (y * torch.randn_like(y)).sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return dict(y=y, x=x.grad) | gradients


def assert_equal(one, two, tolerance):
    for name, expected in two.items():
        if expected is None:
            assert one[name] is None, name
            continue
        scale = max(expected.abs().max().item(), 1.0)
        assert (one[name] - expected).abs().max().item() <= tolerance * scale, name


@pytest.mark.parametrize('channels_last', [False, True])
def test_same_function_and_gradients(layer, config, channels_last):
    model, plain = pair(layer, config)
    x = layer.input()
    if channels_last:
        if x.ndim != 4:
            return
        x = x.contiguous(memory_format=torch.channels_last)
    assert_equal(results(model, x), results(plain, x), 1e-10)
