"""Parallel adapters beside a layer or an MLP: formulas, sizes and starts."""

import copy
import math

import numpy as np
import pytest
import timm
import torch
from torch import nn

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.injection.insertion_points import Search
from mmpeft.injection.site import adapters_of, attached
from mmpeft.methods.activation.parallel import factor_shapes
from tests.activations import ACTIVATIONS, adapted, channels_last, close, factors_of, recorded
from tests.cases import LAYERS, Layer, randomize

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


ONE_LAYER = {n: c for n, c in LAYERS.items() if n != 'embedding' and not n.startswith('attention')}
UNEVEN = dict(
    reflect=Layer(
        lambda: nn.Conv2d(3, 4, (3, 5), padding=(1, 2), padding_mode='reflect'), (2, 3, 5, 6)
    ),
    same=Layer(lambda: nn.Conv2d(3, 4, (2, 4), padding='same', dilation=(1, 2)), (2, 3, 5, 8)),
    replicate_same=Layer(
        lambda: nn.Conv1d(4, 4, 4, padding='same', groups=2, padding_mode='replicate'), (2, 4, 7)
    ),
    valid=Layer(lambda: nn.Conv1d(4, 4, 4, padding='valid'), (2, 4, 7)),
    transposed=Layer(
        lambda: nn.ConvTranspose2d(4, 6, (3, 2), (2, 3), (1, 0), (1, 2), 2), (2, 4, 4, 3)
    ),
)


@pytest.mark.parametrize('name', ONE_LAYER | UNEVEN)
def test_without_a_nonlinearity_a_parallel_adapter_is_lora(name):
    case = (ONE_LAYER | UNEVEN)[name]
    layer, x = case.make().double(), case.input()
    one, two = nn.Sequential(copy.deepcopy(layer)), nn.Sequential(copy.deepcopy(layer))
    method = dict(type='ParallelAdapter', rank=3, activation='identity', scale=0.7)
    parallel = mmpeft.inject(one, method)
    lora = mmpeft.inject(two, dict(type='LoRA', rank=3, scale=0.7, layout='channel'))
    assert parallel.adapters == lora.adapters
    randomize(one)
    ours, theirs = adapters_of(one[0], '')[0], adapters_of(two[0], 'weight')[0]
    with torch.no_grad():
        if getattr(layer, 'transposed', False):
            theirs.lora_A.copy_(ours.up.flatten(1))
            groups = ours.down.unflatten(0, (layer.groups, 3))
            theirs.lora_B.copy_(groups.transpose(1, 2).flatten(0, 1))
        else:
            theirs.lora_A.copy_(ours.down.flatten(1))
            theirs.lora_B.copy_(ours.up)
    assert not torch.equal(one(x), layer(x))
    torch.testing.assert_close(one(x), two(x), rtol=1e-12, atol=1e-12)


def window_at(position, layer):
    """The slices of a padded map that a kernel covers."""
    sizes = zip(position, layer.stride, layer.dilation, layer.kernel_size, strict=True)
    return tuple(slice(p * s, p * s + d * (k - 1) + 1, d) for p, s, d, k in sizes)


def numpy_convolution(x, weights, layer, size):
    """By its definition; ``weights`` one kernel a group."""
    frame = [(0, 0), (0, 0), *((p, p) for p in layer.padding)]
    groups = np.split(np.pad(x, frame), layer.groups, 1)
    y = np.zeros((len(x), sum(len(w) for w in weights), *size))
    for position in np.ndindex(*size):
        at = (slice(None), slice(None), *window_at(position, layer))
        parts = [
            np.tensordot(g[at], w, (range(1, w.ndim),) * 2)
            for g, w in zip(groups, weights, strict=True)
        ]
        y[(..., *position)] = np.concatenate(parts, 1)
    return y


def numpy_transposed(x, weights, layer, size):
    """By its definition; ``weights`` one kernel a group."""
    padded = [n + 2 * p for n, p in zip(size, layer.padding, strict=True)]
    parts = []
    for group, weight in zip(np.split(x, layer.groups, 1), weights, strict=True):
        y = np.zeros((len(x), weight.shape[1], *padded))
        for position in np.ndindex(*x.shape[2:]):
            at = (slice(None), slice(None), *window_at(position, layer))
            y[at] += np.tensordot(group[(..., *position)], weight, (1, 0))
        parts.append(y)
    inside = tuple(slice(p, p + n) for p, n in zip(layer.padding, size, strict=True))
    return np.concatenate(parts, 1)[(..., *inside)]


@pytest.mark.parametrize('activation', ['relu', 'gelu'])
@pytest.mark.parametrize(
    'name', ['conv1d', 'conv2d', 'depthwise', 'conv3d', 'transposed1d', 'transposed2d']
)
def test_a_parallel_adapter_on_convolutions_by_definition(name, activation):
    layer, x = LAYERS[name].make().double(), LAYERS[name].input()
    model = nn.Sequential(layer)
    before = model(x).detach().numpy()
    mmpeft.inject(model, dict(type='ParallelAdapter', rank=2, activation=activation, scale=1.5))
    randomize(model)
    f, groups, size = factors_of(attached(model)[0]), layer.groups, before.shape[2:]
    mixes = np.split(f['down' if layer.transposed else 'up'], groups)

    def mixed(x):
        parts = zip(np.split(x, groups, 1), mixes, strict=True)
        return np.concatenate([np.moveaxis(g, 1, -1) @ m.T for g, m in parts], -1)

    if layer.transposed:
        inner = ACTIVATIONS[activation](np.moveaxis(mixed(x.numpy()), -1, 1))
        added = numpy_transposed(inner, [f['up']] * groups, layer, size)
    else:
        inner = numpy_convolution(x.numpy(), [f['down']] * groups, layer, size)
        added = np.moveaxis(mixed(ACTIVATIONS[activation](inner)), -1, 1)
    close(model(x).detach(), before + 1.5 * added)


def test_a_parallel_adapter_on_a_linear_layer():
    layer, x = nn.Linear(6, 5).double(), torch.randn(3, 4, 6, dtype=torch.float64)
    model = nn.Sequential(layer)
    before = model(x).detach().numpy()
    mmpeft.inject(model, dict(type='ParallelAdapter', rank=2, scale=0.3))
    randomize(model)
    f = factors_of(attached(model)[0])
    close(model(x).detach(), before + 0.3 * np.maximum(x.numpy() @ f['down'].T, 0) @ f['up'].T)


@pytest.mark.parametrize('name', ['vit', 'convnext', 'swin'])
def test_a_scaled_parallel_adapter_is_beside_the_whole_mlp(name):
    plain, model, x = adapted(name, dict(type='ScaledParallelAdapter', rank=3))
    calls = {at.path: recorded(at.layer) for at in attached(model)}
    model(x)
    assert [path.removeprefix('0.') for path in calls] == ['1.mlp', '2.mlp']
    for at in attached(model):
        (given, returned), f, axis = calls[at.path][0], factors_of(at), at.adapter.spec.axis
        y = channels_last(plain.get_submodule(at.path)(given), axis)
        inner = np.maximum(channels_last(given, axis) @ f['down'].T, 0)
        close(channels_last(returned, axis), y + 4 * inner @ f['up'].T)
        assert f['down'].shape == (3, given.shape[axis])


def test_a_parallel_adapter_follows_an_output_size_given_in_the_call():
    layer = nn.ConvTranspose2d(3, 4, 3, stride=2)
    model, x = nn.Sequential(layer), torch.randn(1, 3, 4, 4)
    mmpeft.inject(model, dict(type='ParallelAdapter', rank=2))
    randomize(model)
    small, large = layer(x), layer(x, output_size=(10, 10))
    assert large.shape[2:] == (10, 10)
    torch.testing.assert_close(large[..., :9, :9], small)


def test_a_parallel_adapter_takes_a_map_without_a_batch():
    for layer in (nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.ConvTranspose2d(4, 6, 3, groups=2)):
        model, x = nn.Sequential(layer), torch.randn(2, 4, 5, 5)
        mmpeft.inject(model, dict(type='ParallelAdapter', rank=2))
        randomize(model)
        torch.testing.assert_close(model(x[0]), model(x)[0])


def test_a_convolution_that_pads_in_a_way_of_its_own_is_refused():
    model = nn.Sequential(timm.layers.Conv2dSame(3, 4, 3, stride=2))
    mmpeft.inject(model, dict(type='ParallelAdapter', rank=2))
    with pytest.raises(UsageError, match=r'kernel \(3, 3\) returned .* leave such layers out'):
        model(torch.randn(1, 3, 9, 9))


@pytest.mark.parametrize('name', ONE_LAYER)
def test_a_parallel_adapter_starts_as_a_layer_does(name):
    model = LAYERS[name].build()
    (point,) = Search(model).find('layer').values()
    down, up = factor_shapes(point, 3)
    mmpeft.inject(model, dict(type='ParallelAdapter', rank=3))
    factors = attached(model)[0].adapter.factors
    bound = math.prod(down[1:]) ** -0.5
    assert factors['down'].shape == down and factors['up'].shape == up
    assert 0.5 * bound < factors['down'].abs().max() <= bound and not factors['up'].any()
