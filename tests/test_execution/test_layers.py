"""Layers change their class to compute faster, and take it back."""

import copy

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from mmcv.cnn.bricks import wrappers as mmcv
from torch import nn

import mmpeft
from mmpeft import execution
from mmpeft.analysis.memory import saved_bytes
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


class Standardized(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)


def doubled(x, weight, bias):
    return 2 * nn.functional.conv2d(x, weight, bias, padding=1)


@pytest.mark.parametrize('method', ['lora', 'flora', 'dora', 'liera', 'ssb'])
@pytest.mark.parametrize(
    'change',
    [
        dict(padding_mode='circular'),
        dict(stride=(2, 2)),
        dict(stride=[2, 2]),
        dict(padding=(0, 0)),
        dict(dilation=(2, 2)),
        dict(_conv_forward=doubled),
        None,
    ],
)
def test_a_convolution_computes_as_its_layer_says_now(change, method):
    """A padding that is changed later, as for seamless images, or a kernel of its own."""
    torch.manual_seed(0)
    kind = Standardized if change is None else nn.Conv2d
    plain = nn.Sequential(kind(3, 8, 3, padding=1)).double()
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64, requires_grad=True)
    outputs = []
    for way in ('plain', 'auto'):
        network = copy.deepcopy(plain)
        torch.manual_seed(1)
        mmpeft.inject(network, METHODS[method], execution=way)
        randomize(network)
        for name, value in (change or {}).items():
            setattr(network[0], name, value)
        with torch.no_grad():
            still = network(x)
        y = network(x)
        factors = [p for p in network.parameters() if p.requires_grad]
        found = torch.autograd.grad(y.square().sum(), [x, *factors])
        outputs.append([still, y, *found])
        if change and way == 'auto':
            assert execution.is_enabled(network[0])
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('method', ['lora', 'flora', 'ssb'])
def test_complex_weights_are_left_to_torch(method):
    found = []
    for way in ('plain', 'auto'):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(torch.complex128)
        mmpeft.inject(network, METHODS[method], execution=way)
        randomize(network)
        network(torch.randn(3, 4, dtype=torch.complex128)).abs().square().sum().backward()
        found.append([p.grad for p in network.parameters() if p.requires_grad])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_inputs_can_be_named():
    network = nn.ModuleList([nn.Conv2d(3, 3, 1), nn.Linear(3, 3), nn.GELU(), nn.LayerNorm(3)])
    mmpeft.inject(network, METHODS['lora'], dict(include=['^[01]']))
    x = torch.randn(2, 3, 3, 3, requires_grad=True)
    for layer in network:
        assert torch.equal(layer(input=x), layer(x))


def test_hooks_added_after_the_adapters_stay(network):
    """accelerate keeps the forward that it replaces on the layer."""
    x = torch.randn(2, 3, 3, 3)
    expected = network(x)
    mmpeft.inject(network, METHODS['lora'])
    for layer in network:
        add_hook_to_module(layer, ModelHook())
    assert torch.equal(network(x), expected)
    mmpeft.remove(network)
    assert torch.equal(network(x), expected)
    for layer in network:
        remove_hook_from_module(layer)
    assert torch.equal(network(x), expected)
    x.requires_grad_(True)
    network(x).sum().backward()


@pytest.mark.parametrize('memory', ['speed', 'balanced'])
def test_layers_of_mmcv_compute_as_torchs(memory):
    """Its transformers have these wrappers."""

    def adapted(linear, conv):
        torch.manual_seed(0)
        block = nn.Sequential(linear(8, 16), nn.GELU(), linear(16, 8), nn.LayerNorm(8))
        mixer = nn.Sequential(conv(4, 4, 3, padding=1), nn.GELU(), conv(4, 4, 3, padding=1))
        model = nn.Sequential(block, mixer)
        mmpeft.inject(model, METHODS['lora'], memory=memory)
        randomize(model)
        return model

    plain, wrapped = adapted(nn.Linear, nn.Conv2d), adapted(mmcv.Linear, mmcv.Conv2d)
    x = torch.randn(2, 4, 8, 8)
    for a, b in zip(plain.modules(), wrapped.modules(), strict=True):
        assert isinstance(a, Fast) == isinstance(b, Fast)
    assert torch.equal(plain(x), wrapped(x))
    assert saved_bytes(plain, x)[0] == saved_bytes(wrapped, x)[0]
