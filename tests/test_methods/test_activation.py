"""Methods that act on activations: formulas, counts, insertion points, and what they live with."""

import copy
import math

import mmdet.models
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.injection.insertion_points import Search
from mmpeft.injection.site import adapters_of, attached, named_adapters
from mmpeft.methods import ActivationAdapter
from mmpeft.methods.activation.parallel import factor_shapes
from mmpeft.methods.activation.prompts import ring_numbers
from mmpeft.models import InternViT, TimmBackbone
from tests.cases import (
    BLOCKS,
    LAYERS,
    METHODS,
    NO_PLACE,
    Attention,
    Layer,
    TransformerBlock,
    randomize,
)

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')

ACTIVATIONS = dict(
    gelu=lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
    relu=lambda x: np.maximum(x, 0),
    swish=lambda x: x / (1 + np.exp(-x)),
    identity=lambda x: x,
)
CASES = [
    (name, key)
    for name in BLOCKS
    for key in (
        'houlsby',
        'pfeiffer',
        'parallel',
        'scaled_parallel',
        'vpt',
        'vpt_deep',
        'mona',
        'convpass',
    )
    if (METHODS[key]['type'], name) not in NO_PLACE
]
over_cases = pytest.mark.parametrize('name, key', CASES, ids=lambda part: part)


def close(a, b):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-12, atol=1e-12)


def adapted(name, method, **targets):
    """A small network, the same adapted and moved off its start, and an input."""
    plain = BLOCKS[name].build().requires_grad_(False)
    model = copy.deepcopy(plain).requires_grad_(True)
    mmpeft.inject(model, method, targets)
    randomize(model)
    return plain, model, BLOCKS[name].input()


def recorded(module):
    """A list that receives the input and output of each call of a module."""
    calls = []

    def hook(_, args, output):
        y = output[0] if isinstance(output, tuple) else output
        calls.append((args[0].detach().clone(), y.detach().clone()))

    module.register_forward_hook(hook)
    return calls


def channels_last(x, axis):
    return np.moveaxis(x.detach().numpy(), axis, -1)


def factors_of(site):
    return {k: v.detach().numpy() for k, v in site.adapter.factors.items()}


# Houlsby, Pfeiffer


@pytest.mark.parametrize('activation', ACTIVATIONS)
@pytest.mark.parametrize('name', BLOCKS)
def test_a_bottleneck_behind_each_branch(name, activation):
    method = dict(type='HoulsbyAdapter', rank=3, activation=activation)
    plain, model, x = adapted(name, method)
    calls = {at.path: recorded(at.layer) for at in attached(model)}
    model(x)
    for at in attached(model):
        (given, returned), f, axis = calls[at.path][0], factors_of(at), at.adapter.spec.axis
        before = plain.get_submodule(at.path)(given)
        y = channels_last(before[0] if isinstance(before, tuple) else before, axis)
        inner = ACTIVATIONS[activation](y @ f['down'].T + f['down_bias'])
        close(channels_last(returned, axis), y + inner @ f['up'].T + f['up_bias'])


@pytest.mark.parametrize(
    'name, houlsby, pfeiffer',
    [
        ('vit', ['1.attn', '1.mlp', '2.attn', '2.mlp'], ['1.mlp', '2.mlp']),
        ('swin', ['1.attn', '1.mlp', '2.attn', '2.mlp'], ['1.mlp', '2.mlp']),
        ('convnext', ['1.conv_dw', '1.mlp', '2.conv_dw', '2.mlp'], ['1.mlp', '2.mlp']),
        ('resnet', ['1.norm3', '2.norm3'], ['1.norm3', '2.norm3']),
    ],
)
def test_where_bottlenecks_stand(name, houlsby, pfeiffer):
    for method, expected in (('HoulsbyAdapter', houlsby), ('PfeifferAdapter', pfeiffer)):
        _, model, _ = adapted(name, dict(type=method, rank=2))
        assert [at.path.removeprefix('0.') for at in attached(model)] == expected


@pytest.mark.parametrize('rank', [1, 8])
def test_parameters_of_bottlenecks_in_closed_form(rank):
    with torch.device('meta'):
        model = timm.create_model('convnextv2_atto', features_only=True)
    widths = [40] * 2 + [80] * 2 + [160] * 6 + [320] * 2
    one = [2 * d * rank + rank + d for d in widths]
    pfeiffer = mmpeft.inject(model, dict(type='PfeifferAdapter', rank=rank))
    assert [row.adapter for row in pfeiffer.rows] == one
    mmpeft.remove(model)
    assert mmpeft.inject(model, dict(type='HoulsbyAdapter', rank=rank)).adapters == 2 * sum(one)


def test_a_budget_gives_the_largest_rank():
    with torch.device('meta'):
        model = timm.create_model('vit_tiny_patch16_224')
    summary = mmpeft.inject(model, dict(type='HoulsbyAdapter', budget='100k'))
    rank = model.peft[0].method.rank
    assert summary.adapters == 24 * (2 * 192 * rank + rank + 192) <= 100_000
    assert 24 * (2 * 192 * (rank + 1) + rank + 1 + 192) > 100_000


def test_a_bottleneck_starts_uniform_below_and_at_zero_elsewhere():
    model = nn.Sequential(nn.Linear(400, 800), nn.GELU(), nn.Linear(800, 400))
    mmpeft.inject(model, dict(type='PfeifferAdapter', rank=50))
    factors = attached(model)[0].adapter.factors
    bound = 400**-0.5
    assert 0.99 * bound < factors['down'].abs().max() <= bound
    assert abs(factors['down'].std() / bound * 3**0.5 - 1) < 0.02
    assert not any(factors[name].any() for name in ('up', 'down_bias', 'up_bias'))


def test_the_rest_of_a_tuple_is_kept():
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    model, x = nn.Sequential(attention), torch.randn(2, 5, 8)
    before, weights = attention(x, x, x)
    mmpeft.inject(model, dict(type='HoulsbyAdapter', rank=2))
    randomize(model)
    after, same = attention(query=x, key=x, value=x)
    assert torch.equal(weights, same) and not torch.equal(before, after)


# Two layers beside attention that share no module of their own


class FlatBlock(nn.Module):
    """As in BERT, without norms."""

    def __init__(self):
        super().__init__()
        self.attn, self.act = Attention(8), nn.GELU()
        self.intermediate, self.output = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.output(self.act(self.intermediate(x)))


def flat(key):
    plain = nn.Sequential(FlatBlock(), FlatBlock()).double().requires_grad_(False)
    model = copy.deepcopy(plain)
    mmpeft.inject(model, METHODS[key])
    randomize(model)
    return plain, model, torch.randn(2, 5, 8, dtype=torch.float64)


@pytest.mark.parametrize('key', ['pfeiffer', 'scaled_parallel'])
def test_an_adapter_between_two_layers_of_a_block(key):
    plain, model, expected = flat(key)
    x = expected.clone()
    assert [(at.path, at.adapter.spec.ends) for at in attached(model)] == [
        (path, ('intermediate', 'output')) for path in '01'
    ]
    for block, at in zip(plain, attached(model), strict=True):
        f = at.adapter.factors
        given = expected + block.attn(expected)
        returned = block.output(block.act(block.intermediate(given)))
        if key == 'pfeiffer':
            inner = F.silu(F.linear(returned, f['down'], f['down_bias']))
            added = F.linear(inner, f['up'], f['up_bias'])
        else:
            added = 4 * F.linear(F.linear(given, f['down']).relu(), f['up'])
        expected = given + returned + added
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('key', ['houlsby', 'scaled_parallel'])
def test_what_an_adapter_between_two_layers_lives_with(key, tmp_path):
    plain, model, x = flat(key)
    y = model(x)
    y.square().sum().backward()
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = [p.grad.clone() for p in parameters]
    model.zero_grad()
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, expected, strict=True))
    with pytest.raises(RuntimeError):
        model[0].act.register_forward_hook(lambda *_: torch.ones(2, 5, 7))
        model(x)
    model[0].act._forward_hooks.popitem()
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), y)
    randomize(copied)
    assert torch.equal(model(x), y) and not torch.equal(copied(x), y)
    path = mmpeft.save_adapter(model, tmp_path / 'adapter.safetensors')
    loaded = copy.deepcopy(plain)
    mmpeft.load_adapter(loaded, path)
    assert torch.equal(loaded(x), y)
    mmpeft.remove(model)
    assert torch.equal(model(x), plain(x)) and not hooks(model)


# Parallel

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


# VPT on transformers


def through(model, x, prompts, deep):
    """The blocks of the small transformer with prompts put in and cut off by hand."""
    tokens = model[0][0](x)
    length, carried = tokens.shape[1], None
    for number, block in enumerate((model[0][1], model[0][2])):
        if deep or number == 0:
            carried = prompts[number].expand(len(x), -1, -1)
        y = block(torch.cat([tokens, carried], 1))
        tokens, carried = y[:, :length], y[:, length:]
    return tokens


@pytest.mark.parametrize('deep', [False, True])
def test_vpt_appends_prompts_and_hides_them(deep):
    plain, model, x = adapted('vit', dict(type='VPT', tokens=3, deep=deep))
    prompts = [at.adapter.prompts for at in attached(model)]
    assert len(prompts) == 2 and (prompts[0] is prompts[1]) is not deep
    expected = through(plain, x, prompts, deep)
    assert model(x).shape == plain(x).shape
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(model(x), plain(x))


@pytest.mark.parametrize('deep, count', [(False, 1), (True, 12)])
def test_parameters_of_vpt_in_closed_form(deep, count):
    with torch.device('meta'):
        model = timm.create_model('vit_tiny_patch16_224')
    summary = mmpeft.inject(model, dict(type='VPT', tokens=50, deep=deep))
    assert summary.adapters == count * 50 * 192 and len(summary.rows) == 12
    assert len(mmpeft.adapter_state_dict(model)) == count


@pytest.mark.parametrize('patch_size', [4, 16])
def test_vpt_starts_uniform_as_in_the_paper(patch_size):
    model = BLOCKS['vit'].build()
    mmpeft.inject(model, dict(type='VPT', tokens=5000, deep=True, patch_size=patch_size))
    bound = math.sqrt(6 / (3 * patch_size * patch_size + 8))
    for adapter in named_adapters(model).values():
        assert 0.999 * bound < adapter.prompts.abs().max() <= bound
        assert abs(adapter.prompts.std() / bound * 3**0.5 - 1) < 0.01


@pytest.mark.parametrize('deep', [False, True])
def test_vpt_in_timm_shows_nothing_of_its_prompts(deep):
    model = timm.create_model(
        'vit_tiny_patch16_224', depth=3, embed_dim=24, img_size=32, features_only=True
    )
    x = torch.randn(2, 3, 32, 32)
    before = [y.shape for y in model(x)]
    mmpeft.inject(model, dict(type='VPT', tokens=3, deep=deep))
    after = model(x)
    assert [y.shape for y in after] == before
    sum(y.sum() for y in after).backward()
    assert all(
        p.grad.any() for adapter in named_adapters(model).values() for p in adapter.parameters()
    )


class Between(nn.Module):
    def __init__(self, between, attention=Attention):
        super().__init__()
        self.blocks = nn.ModuleList([TransformerBlock(attention(8), 8) for _ in range(2)])
        self.between = between

    def forward(self, x):
        return self.blocks[1](self.between(self.blocks[0](x)))


def test_shallow_vpt_tells_when_its_prompts_got_lost():
    x = torch.randn(2, 5, 8)
    for between, targets in ((lambda x: x + 0, None), (lambda x: x, dict(include=r'blocks\.1'))):
        model = Between(between)
        mmpeft.inject(model, dict(type='VPT'), targets)
        with pytest.raises(
            UsageError, match='prompts of the block before did not reach .*deep=True'
        ):
            model(x)
        mmpeft.remove(model)
        mmpeft.inject(model, dict(type='VPT', deep=True), targets)
        assert model(x).shape == x.shape


class Recomputed(Between):
    def __init__(self, reentrant):
        super().__init__(None)
        self.reentrant = reentrant

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def test_shallow_vpt_in_a_reentrant_checkpoint_is_refused():
    model = Recomputed(reentrant=True)
    mmpeft.inject(model, dict(type='VPT'))
    y = model(torch.randn(2, 5, 8, requires_grad=True))
    with pytest.raises(UsageError, match='reentrant'):
        y.sum().backward()


class Pooling(TransformerBlock):
    def forward(self, x):
        return super().forward(x)[:, :1]


@pytest.mark.parametrize(
    'block, size, message',
    [
        (TransformerBlock, (2, 2, 3, 8), 'prompts need a sequence'),
        (Pooling, (2, 5, 8), 'prompts in its output are unknown'),
    ],
)
def test_vpt_refuses_blocks_on_other_than_sequences(block, size, message):
    class AnyShape(Attention):
        def forward(self, x):
            return self.proj(self.qkv(x)[..., :8])

    model = nn.Sequential(block(AnyShape(8), 8))
    mmpeft.inject(model, dict(type='VPT'))
    with pytest.raises(UsageError, match=message):
        model(torch.randn(size))


# VPT on convolutional networks


@pytest.mark.parametrize(
    'convolution',
    [
        dict(kernel_size=3, padding=1),
        dict(kernel_size=(3, 5), padding=(1, 2), groups=2),
        dict(kernel_size=5, padding='same', dilation=2),
        dict(kernel_size=7, padding=3, groups=4),
        dict(kernel_size=(1, 3), padding=(0, 1)),
        dict(kernel_size=5, padding=1),
    ],
)
def test_vpt_replaces_the_zeros_of_a_padding(convolution):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, **convolution)

        def forward(self, x):
            return self.conv2(self.conv1(x))

    model, x = Block().double(), torch.randn(2, 4, 6, 9, dtype=torch.float64)
    middle = model.conv1(x).detach().numpy()
    mmpeft.inject(model, dict(type='VPT'))
    randomize(model)
    (at,) = attached(model)
    pads = [before for before, _ in at.adapter.spec.geometry.padding]
    rings = factors_of(at)['prompts']
    assert at.path == 'conv2' and rings.shape == (4, max(pads))
    framed = np.zeros((2, 4, 6 + 2 * pads[0], 9 + 2 * pads[1]))
    for h, w in np.ndindex(*framed.shape[2:]):
        beyond = [max(pads[0] - h, h - pads[0] - 5), max(pads[1] - w, w - pads[1] - 8)]
        ring = max(beyond)
        framed[..., h, w] = (
            rings[:, ring - 1] if ring > 0 else middle[..., h - pads[0], w - pads[1]]
        )
    layer = model.conv2
    expected = F.conv2d(
        torch.from_numpy(framed),
        layer.weight,
        layer.bias,
        dilation=layer.dilation,
        groups=layer.groups,
    )
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_numbers_of_rings():
    assert ring_numbers((2, 1), (1, 2)).tolist() == [
        [2, 1, 1, 1, 2],
        [2, 1, 0, 1, 2],
        [2, 1, 0, 1, 2],
        [2, 1, 1, 1, 2],
    ]


@pytest.mark.parametrize(
    'deep, expected', [(False, ['1.conv_dw']), (True, ['1.conv_dw', '2.conv_dw'])]
)
def test_vpt_on_convolutions_is_in_the_first_block_or_in_each(deep, expected):
    model = BLOCKS['convnext'].build()
    summary = mmpeft.inject(model, dict(type='VPT', deep=deep))
    assert [row.name.removeprefix('0.') for row in summary.rows] == expected
    assert summary.adapters == len(expected) * 6 * 2


def test_vpt_keeps_the_layout_of_memory():
    model = BLOCKS['convnext'].build(torch.float32)[0]
    mmpeft.inject(model, dict(type='VPT'))
    layer, x = model[1].conv_dw, torch.randn(2, 6, 5, 7)
    assert layer(x).is_contiguous()
    y = layer.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('argument', ['tokens', 'patch_size'])
def test_vpt_wants_positive_numbers(argument):
    with pytest.raises(UsageError, match=f'VPT: {argument}=0 must be a positive integer'):
        mmpeft.METHODS.build({'type': 'VPT', argument: 0})


@pytest.mark.parametrize('method', ['HoulsbyAdapter', 'ParallelAdapter'])
@pytest.mark.parametrize(
    'arguments, message',
    [
        (dict(rank=(2, 3)), 'must be one integer'),
        (dict(activation='tanh'), "activation='tanh' is unknown.*'gelu', 'relu', 'swish'"),
    ],
)
def test_arguments_that_adapters_refuse(method, arguments, message):
    with pytest.raises(UsageError, match=message):
        mmpeft.METHODS.build(dict(type=method, **arguments))


def test_a_branch_does_not_expand_what_a_module_returns():
    model = timm.create_model('cait_xxs24_224', depth=1, img_size=32)
    mmpeft.inject(model, dict(type='Convpass', rank=2))
    with pytest.raises(UsageError, match=r'returned .*\(1, 1, 192\) for \(1, 5, 192\), as att'):
        model(torch.randn(1, 3, 32, 32))


# What all of them live with


@pytest.mark.parametrize('type_name, name', sorted(p for p in NO_PLACE if p[1] in BLOCKS))
def test_networks_without_a_place_are_refused(type_name, name):
    model = BLOCKS[name].build()
    with pytest.raises(
        UsageError, match=f'^{type_name} acts at insertion points of kind .* has none'
    ):
        mmpeft.inject(model, dict(type=type_name))


def hooks(model):
    return [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


@over_cases
def test_adapters_of_a_copy_are_the_copys(name, key):
    _, model, x = adapted(name, METHODS[key])
    before, copied = model(x), copy.deepcopy(model)
    own = set(map(id, named_adapters(model).values()))
    others = set(map(id, named_adapters(copied).values()))
    called = [getattr(h, '__self__', h) for m in hooks(copied) for h in m._forward_hooks.values()]
    early = [hook.__self__ for m in hooks(copied) for hook in m._forward_pre_hooks.values()]
    assert set(map(id, called)) == others and set(map(id, early)) <= others and not own & others
    mmpeft.remove(copied)
    assert not hooks(copied) and not named_adapters(copied)
    assert torch.equal(model(x), before) and hooks(model)


@over_cases
def test_removal_leaves_no_hook(name, key):
    plain, model, x = adapted(name, METHODS[key])
    mmpeft.remove(model)
    assert not hooks(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [path for path, _ in model.named_modules()] == [
        path for path, _ in plain.named_modules()
    ]


@over_cases
def test_recomputed_without_reentrance(name, key):
    _, model, x = adapted(name, METHODS[key])
    parameters = [p for p in model.parameters() if p.requires_grad]
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in parameters]
    model.zero_grad()
    y = x
    for stage in model[0]:
        y = checkpoint(stage, y, use_reentrant=False)
    y.square().sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, expected, strict=True))


@over_cases
def test_under_autocast(name, key):
    """Layers run in bfloat16, and adapters get their gradients in float32."""
    model, x = BLOCKS[name].build(torch.float32), BLOCKS[name].input(torch.float32)
    mmpeft.inject(model, METHODS[key])
    randomize(model)
    exact = model(x)
    with torch.autocast('cpu', torch.bfloat16):
        y = model(x)
    assert not torch.equal(y.float(), exact)
    torch.testing.assert_close(y.float(), exact, rtol=0.1, atol=0.1)
    y.float().square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in trained)


def test_a_branch_is_added_in_float32_and_rounded_once():
    layer, x = nn.Conv2d(4, 6, 3, padding=1), torch.randn(2, 4, 5, 5)
    for dtype, context in (
        (torch.bfloat16, torch.autocast('cpu', enabled=False)),
        (torch.float32, torch.autocast('cpu', torch.bfloat16)),
    ):
        model = nn.Sequential(copy.deepcopy(layer)).to(dtype)
        mmpeft.inject(model, dict(type='ParallelAdapter', rank=2))
        randomize(model)
        f, given = adapters_of(model[0], '')[0].factors, x.to(dtype)
        with context, torch.no_grad():
            y = model(given)
            before = type(layer).forward(model[0], given)
        inner = F.conv2d(given.float(), f['down'], padding=1).relu()
        added = F.conv2d(inner, f['up'][:, :, None, None])
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, (before.float() + added).to(torch.bfloat16))


def test_modules_that_get_no_tensor():
    class Lists(nn.Sequential):
        def forward(self, maps):
            return super().forward(maps[0])

    model = nn.Sequential(Lists(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)))
    mmpeft.inject(model, dict(type='HoulsbyAdapter', rank=2), dict(kinds='mlp', include='0'))
    with pytest.raises(UsageError, match=r'got none \(list\)'):
        model([torch.randn(2, 4)])
    with pytest.raises(UsageError, match=r'got none \(Proxy\)'):
        torch.fx.symbolic_trace(model)


def test_modules_that_are_called_by_keyword():
    class Named(TransformerBlock):
        def forward(self, mask=None, hidden=None):
            return super().forward(hidden)

    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Named(Attention(8), 8)

        def forward(self, x):
            return self.block(mask=None, hidden=x)

    for key in ('vpt', 'houlsby'):
        model, x = Calls(), torch.randn(2, 5, 8)
        before = model(x)
        mmpeft.inject(model, METHODS[key])
        randomize(model)
        assert model(x).shape == before.shape and not torch.allclose(model(x), before)


def test_they_compose_with_each_other_and_with_methods_on_weights():
    plain, x = BLOCKS['convnext'].build().requires_grad_(False), BLOCKS['convnext'].input()
    model = copy.deepcopy(plain).requires_grad_(True)
    methods = [
        METHODS[key] for key in ('houlsby', 'parallel', 'lora', 'vpt_deep', 'scaled_parallel')
    ]
    for method in methods:
        mmpeft.inject(model, method)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
    kinds = {type(a.method).__name__ for a in named_adapters(model).values()}
    assert kinds == {method['type'] for method in methods}
    randomize(model)
    model(x).square().sum().backward()
    assert all(p.grad.any() for a in named_adapters(model).values() for p in a.parameters())
    copied = copy.deepcopy(plain)
    for method in methods:
        mmpeft.inject(copied, method)
    copied.load_state_dict(model.state_dict())
    assert torch.equal(copied(x), model(x))
    mmpeft.remove(model)
    assert torch.equal(model(x), plain.requires_grad_(True)(x)) and not hooks(model)


def test_targets_choose_among_insertion_points():
    model = BLOCKS['vit'].build()
    targets = dict(kinds=('attention', 'mlp'), exclude=r'1\.attn', overrides={r'2\.': dict(rank=5)})
    rows = mmpeft.inject(model, dict(type='HoulsbyAdapter', rank=2), targets).rows
    assert [row.name for row in rows] == ['0.1.mlp', '0.2.attn', '0.2.mlp']
    assert [a.method.rank for a in named_adapters(model).values()] == [2, 5, 5]


@pytest.mark.parametrize('key', ['houlsby', 'pfeiffer', 'parallel', 'vpt', 'vpt_deep'])
@pytest.mark.parametrize('depth', [18, 50])
def test_on_mmdets_resnet(depth, key):
    model, x = mmdet.models.ResNet(depth, frozen_stages=-1), torch.randn(2, 3, 64, 64)
    model.eval()
    with torch.no_grad():
        before = model(x)
    mmpeft.inject(model, METHODS[key])
    model.train()
    after = model(x)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    randomize(model, 0.05)
    sum(y.square().mean() for y in model(x)).backward()
    missing = [
        path for path, a in named_adapters(model).items() for p in a.parameters() if p.grad is None
    ]
    assert not missing


BACKBONES = dict(
    swin=lambda: mmdet.models.SwinTransformer(
        embed_dims=12, depths=(2, 1), num_heads=(2, 4), strides=(4, 2), out_indices=(0, 1)
    ),
    convnext=lambda: TimmBackbone(
        'convnextv2_atto', depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), with_cp=True, out_norm=False
    ),
    intern_vit=lambda: InternViT(
        dict(depth=2, width=16, heads=2, hidden=32, image_size=28, patch_size=14), with_cp=True
    ),
    intern_vit_bfloat16=lambda: InternViT(
        dict(depth=2, width=16, heads=2, hidden=32, image_size=28, patch_size=14),
        with_cp=True,
        frozen_dtype='bfloat16',
    ),
)


@pytest.mark.parametrize(
    'name, key',
    [
        (name, key)
        for name in BACKBONES
        for key in ('houlsby', 'pfeiffer', 'parallel', 'scaled_parallel', 'vpt')
        if (name, key) != ('swin', 'vpt')
    ],
)
def test_on_backbones_that_recompute(name, key):
    model, x = BACKBONES[name](), torch.randn(2, 3, 56, 56)
    model.init_weights()
    model.requires_grad_(False).eval()
    before = model(x)
    mmpeft.inject(model, METHODS[key])
    if key != 'vpt' or name == 'convnext':
        assert all(torch.equal(a, b) for a, b in zip(before, model(x), strict=True))
    model.train()
    randomize(model, 0.05)
    after = model(x)
    assert [(y.shape, y.dtype) for y in after] == [(y.shape, y.dtype) for y in before]
    sum(y.square().mean() for y in after).backward()
    adapters = named_adapters(model).values()
    assert all(isinstance(a, ActivationAdapter) and a.training for a in adapters)
    assert all(p.grad is not None for a in adapters for p in a.parameters())
