"""Adapters behind branches and between two layers: formulas, counts and places."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import mmpeft
from mmpeft.injection.site import attached
from tests.activations import (
    ACTIVATIONS,
    adapted,
    channels_last,
    close,
    factors_of,
    hooks,
    recorded,
)
from tests.cases import BLOCKS, METHODS, Attention, randomize

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


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
