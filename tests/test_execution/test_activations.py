"""Activations that work in place, and networks whose norms and activations are one module."""

import copy

import pytest
import timm
import torch
from mmcv.cnn.bricks.swish import Swish
from torch import nn

import mmpeft
from mmpeft import execution
from tests.cases import METHODS, randomize
from tests.comparing import assert_as_plain, assert_equal, plain, second_derivatives
from tests.test_execution.test_recompute import kept_bytes

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')

IN_PLACE = [
    nn.SiLU(True),
    nn.Hardswish(True),
    nn.Mish(True),
    nn.ReLU6(True),
    nn.Hardtanh(-2, 1, True),
]
OTHERS = nn.Hardswish(), nn.Mish(), nn.ReLU6(), nn.LeakyReLU(), Swish()


def between_layers(activation):
    conv, norm = nn.Conv2d(32, 32, 1), nn.BatchNorm2d(32)
    return nn.Sequential(conv, norm, copy.deepcopy(activation), nn.Conv2d(32, 32, 1)).double()


def maps(model, x):
    """How many maps of the size of x are kept for backward."""
    y, kept = kept_bytes(model, x.requires_grad_())
    y.sum().backward()
    return round(kept / x.nbytes)


@pytest.mark.parametrize('activation', [*IN_PLACE, *OTHERS], ids=repr)
def test_one_map_is_kept_beside_the_input(activation):
    """The activation's input, and not what the next layer sees."""
    x, kept = torch.randn(2, 32, 24, 20, dtype=torch.float64), {}
    for way in ('auto', 'plain'):
        model = between_layers(activation)
        mmpeft.inject(model, dict(type='FLoRA', rank=2), execution=way)
        randomize(model)
        assert_as_plain(model, x)
        found = second_derivatives(model, x)
        with plain(model):
            assert_equal(found, second_derivatives(model, x), 1e-10)
        kept[way] = maps(model, x.clone())
    assert kept == dict(auto=2, plain=5 if isinstance(activation, Swish) else 4)


@pytest.mark.parametrize('activation', IN_PLACE, ids=lambda layer: type(layer).__name__)
def test_in_place_by_finite_differences(activation):
    activation = copy.deepcopy(activation)
    execution.enable_frozen(activation)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def run(x):
        y = x * 3
        assert activation(y) is y
        return y

    assert torch.autograd.gradcheck(run, x)
    assert torch.autograd.gradgradcheck(run, x)


@pytest.mark.parametrize('name', ['flora', 'dora', 'ia3', 'ssb', 'loha'])
@pytest.mark.parametrize('activation', IN_PLACE, ids=lambda layer: type(layer).__name__)
def test_in_place_on_what_a_layer_saved(activation, name):
    """Methods that scale outputs save theirs."""
    model = nn.Sequential(nn.Linear(24, 32), copy.deepcopy(activation), nn.Linear(32, 24)).double()
    mmpeft.inject(model, METHODS[name])
    randomize(model)
    assert_as_plain(model, torch.randn(4, 5, 24, dtype=torch.float64))


def test_in_place_as_torch_refuses_and_allows_it():
    activation = nn.SiLU(True)
    execution.enable_frozen(activation)
    x = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match='leaf'):
        activation(x)
    whole = x * 1
    activation(whole[:, :2])  # a view of it
    expected = torch.cat([torch.nn.functional.silu(x[:, :2]), x[:, 2:]], 1)
    assert torch.equal(whole, expected)
    found, expected = (torch.autograd.grad(y.square().sum(), x)[0] for y in (whole, expected))
    assert torch.allclose(found, expected)
    y = x.sin()
    z = y.square()
    activation(y)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        z.sum().backward()


@pytest.mark.parametrize(
    'name, most',
    [
        ('efficientnet_b0', 0.36),
        ('mobilenetv2_100', 0.38),
        ('mobilenetv3_large_100', 0.46),
        ('regnety_002', 0.53),
        ('cspresnet50', 0.6),
        ('seresnext26t_32x4d', 0.6),
    ],
)
def test_convolutional_networks_keep_a_part(name, most):
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=0, drop_path_rate=0.0, scriptable=False)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean, std=0.1)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    network.double()
    x, kept = torch.randn(1, 3, 64, 64, dtype=torch.float64), {}
    frozen = copy.deepcopy(network).requires_grad_(False).eval()
    _, torchs = kept_bytes(frozen, x.requires_grad_())
    mmpeft.inject(network, dict(type='FLoRA', rank=2))
    randomize(network, std=0.02)
    _, kept = kept_bytes(network.train(), x)
    weights = sum(p.nbytes for p in network.parameters() if p.ndim > 2)
    assert kept < most * torchs + weights
    assert_as_plain(network, x.detach())


@pytest.mark.parametrize('training', [False, True])
def test_a_norm_and_its_activation_whose_statistics_train_are_torchs(training):
    network = timm.create_model('test_efficientnet', num_classes=0).double()
    mmpeft.inject(network, METHODS['flora'], unfreeze=['bn'])
    randomize(network)
    assert_as_plain(network.train(training), torch.randn(2, 3, 64, 64).double())
