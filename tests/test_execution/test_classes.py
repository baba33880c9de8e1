"""Layers with changed classes are copied and pickled, and are adapted layers afterwards."""

import abc
import copy
import io
import pickle

import pytest
import torch
from timm.layers import LayerNorm, LayerNorm2d
from timm.models.convnext import ConvNeXtStage
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval, parametrize

import mmpeft
from mmpeft.errors import UsageError
from tests.cases import FAMILIES, METHODS, randomize


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = [through_pickle, through_torch_save, copy.deepcopy]


class Network(nn.Module):
    """Frozen norms with statistics, fast frozen layers, and layers to adapt."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.stage = ConvNeXtStage(
            8, 16, depth=1, use_grn=True, ls_init_value=None, norm_layer=LayerNorm2d,
            norm_layer_cl=LayerNorm,
        )  # fmt: skip
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        return self.fc(self.stage(self.stem(x)).mean((2, 3)))


def names(model):
    return [type(module).__name__ for module in model.modules()]


def modes(model):
    return [module.training for module in model.modules()]


@pytest.fixture
def x():
    return torch.randn(2, 3, 16, 16)


def adapted(name):
    model = Network()
    try:
        mmpeft.inject(model, METHODS[name])
    except mmpeft.errors.UsageError as error:
        assert 'insertion point' in str(error), name  # tokens, in a network of convolutions
        mmpeft.inject(model.fc, METHODS['lora'])
    randomize(model, 0.03)
    return model


@pytest.mark.filterwarnings('ignore:.*adapters have more parameters')
@pytest.mark.parametrize('name', METHODS)
def test_the_same_adapted_model(name, x):
    model = adapted(name)
    y = model.eval()(x)
    for way in WAYS if name in FAMILIES else [through_pickle]:
        other = way(model)
        assert torch.equal(other(x), y)
        assert list(other.state_dict()) == list(model.state_dict())
        assert names(other) == names(model)
        assert modes(other.train()) == modes(model.train())
        assert modes(other.eval()) == modes(model.eval())
        assert str(mmpeft.summary(other)) == str(mmpeft.summary(model))
        other.train()(x).sum().backward() if other.peft[0].method.adapts else None
        mmpeft.remove(other)
        assert names(other) == names(Network())


@pytest.mark.parametrize('way', WAYS)
def test_a_copy_has_tensors_of_its_own(way, x):
    model = adapted('dora').eval()
    other, y = way(model), model(x)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    assert torch.equal(model(x), y)
    assert not torch.equal(other(x), y)


@pytest.mark.parametrize('way', WAYS)
def test_after_a_reversible_merge(way, x):
    model = adapted('flora').eval()
    y = model(x)
    mmpeft.merge(model, reversible=True)
    merged = model(x)
    other = way(model)
    assert torch.equal(other(x), merged)
    assert torch.equal(mmpeft.unmerge(other)(x), y)


def test_two_methods_and_a_norm_that_is_adapted(x):
    model = adapted('lora')
    mmpeft.inject(model, dict(type='FLoRA', rank=1), dict(kinds=['norm']))
    randomize(model, 0.03)
    y = model.eval()(x)
    for way in WAYS:
        other = way(model)
        assert torch.equal(other(x), y)
        assert modes(other.train()) == modes(model.train())
        model.eval()
        mmpeft.remove(other)
        assert names(other) == names(Network())


class Perceptron(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.act, self.second = nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6)

    def forward(self, x):
        return x + self.second(self.act(self.first(x)))


def perceptrons(method, **how):
    model = nn.Sequential(Perceptron(), Perceptron(), Perceptron())
    mmpeft.inject(model, method, **how)
    return model


@pytest.mark.parametrize('way', [None, *WAYS])
@pytest.mark.parametrize('execution', ['auto', 'plain'])
@pytest.mark.parametrize('name', ['lora', 'flora', 'liera', 'dora', 'ia3'])
def test_equal_blocks_are_compiled_once(name, execution, way):
    """As torch compiles plain ones: layers that are adapted alike are of one class."""
    torch._dynamo.reset()
    model = perceptrons(METHODS[name], execution=execution)
    model = model if way is None else way(model)
    compiled = []

    def count(graph, inputs):
        compiled.append(graph)
        return graph.forward

    for block in model:
        block.compile(backend=count)
    model(torch.randn(2, 6, requires_grad=True)).sum().backward()
    assert len(compiled) == 1


def test_a_parametrization_of_one_layer_leaves_the_others_alone():
    class Double(nn.Module):
        def forward(self, tensor):
            return 2 * tensor

    model, x = perceptrons(dict(type='LoRA', rank=2)), torch.randn(2, 6)
    first, second, third = (block.first for block in model)
    assert type(first) is type(second)
    before, bias = second(x), first.bias.detach().clone()
    for layer in (first, third):
        parametrize.register_parametrization(layer, 'bias', Double())
    assert torch.equal(first.bias, 2 * bias) and torch.equal(second(x), before)
    with torch.no_grad():
        second.bias = nn.Parameter(second.bias + 1)
    assert torch.equal(second.bias, second._parameters['bias'])
    parametrize.remove_parametrizations(first, 'bias', leave_parametrized=False)
    assert torch.equal(first.bias, bias)
    assert torch.equal(third.bias, 2 * third.parametrizations.bias.original)


@pytest.mark.parametrize('name', ['lora', 'dora'])
def test_weights_that_torch_keeps_are_of_their_own_layer(name):
    """Inside ``parametrize.cached()`` equal layers read their own weights."""
    model = perceptrons(METHODS[name])
    randomize(model)
    expected = [block.first.weight for block in model]
    with parametrize.cached():
        found = [block.first.weight for block in model]
        assert all(block.first.weight is weight for block, weight in zip(model, found, strict=True))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize('way', WAYS)
def test_copies_of_a_layer_with_a_parametrization_beside_the_adapter(way):
    model = perceptrons(dict(type='LoRA', rank=2))
    parametrize.register_parametrization(model[1].first, 'bias', nn.Softplus(), unsafe=True)
    other, x = way(model), torch.randn(2, 6)
    assert torch.equal(other(x), model(x))
    with torch.no_grad():
        other[1].first.parametrizations.bias.original.add_(1)
    assert not torch.equal(other(x), model(x))


def test_no_parameter_takes_the_place_of_an_adapted_one():
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Linear(4, 3)).eval()
    mmpeft.inject(model, METHODS['lora'])
    with pytest.raises(UsageError, match='The weight of a layer is adapted'):
        fuse_conv_bn_eval(model[0], model[1])
    with pytest.raises(UsageError, match='tying'):
        model[2].weight = model[0].weight.detach()
    with pytest.raises(UsageError, match=r'The parametrizations\.weight\.original'):
        model[2].register_parameter('parametrizations.weight.original', nn.Parameter(torch.ones(1)))
    model[2].bias = nn.Parameter(torch.ones(3))
    mmpeft.merge(model)
    model[2].weight = nn.Parameter(torch.ones(3, 4))
    assert fuse_conv_bn_eval(model[0], model[1]).bias is not None


def test_a_mode_of_memory_is_of_one_model():
    def repeats(model):
        return [block.act.repeats_products for block in model]

    first = perceptrons(dict(type='LoRA', rank=2), memory='speed')
    second = perceptrons(dict(type='LoRA', rank=2), memory='balanced')
    third = perceptrons(dict(type='LoRA', rank=2), memory='speed')
    assert repeats(second) == [True] * 3
    assert repeats(first) == repeats(third) == [False] * 3


class Abstract(nn.Linear, metaclass=abc.ABCMeta):
    pass


@pytest.mark.parametrize('execution', ['auto', 'plain'])
@pytest.mark.parametrize('kind', [nn.Linear, Abstract])
def test_removal_from_a_copy_leaves_the_layer_adapted(kind, execution):
    layers, x = nn.Sequential(kind(6, 6), kind(6, 6)), torch.randn(2, 6)
    before = layers(x)
    mmpeft.inject(layers, dict(type='LoRA', rank=2), execution=execution)
    randomize(layers)
    y = layers(x)
    for way in WAYS:
        other = way(layers)
        mmpeft.remove(other)
        assert type(other[0]) is kind and torch.equal(other(x), before)
        assert type(layers[0]) is type(layers[1]) and torch.equal(layers(x), y)
