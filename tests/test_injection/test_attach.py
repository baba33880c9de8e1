"""Attaching adapters by path, tied weights, and detaching."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.injection.attach import adapt, attach, detach, detachable
from mmpeft.injection.freeze import Injection
from mmpeft.injection.site import adapter_parameters, attached, sites_at
from tests.cases import METHODS, Attention, TransformerBlock, randomize
from tests.networks import Net, Tied, assert_same, snapshot

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


def test_tied_weights_stay_tied():
    model, index = Tied().double(), torch.arange(9)
    plain = copy.deepcopy(model)
    summary = mmpeft.inject(model, dict(type='LoRA', rank=2), dict(kinds=('linear', 'embedding')))
    assert len(summary.rows) == 1
    randomize(model)
    assert torch.equal(model.embed.weight, model.out.weight)
    expected = model(index)
    mmpeft.merge(model)
    assert model.out.weight is model.embed.weight
    torch.testing.assert_close(model(index), expected, rtol=1e-10, atol=1e-10)
    assert not torch.equal(model(index), plain(index))


def test_a_module_that_is_used_twice_has_one_adapter():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert len(mmpeft.inject(model, dict(type='LoRA', rank=1)).rows) == 1


def test_on_top_of_weight_norm():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 4))).double()
    x = torch.randn(3, 5, dtype=torch.float64)
    before = model(x)
    mmpeft.inject(model, dict(type='LoRA', rank=2))
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 and all('lora' in n for n in trained)
    with pytest.raises(UsageError, match='not of mmpeft'):
        mmpeft.merge(model)


def test_the_layout_of_memory_is_kept():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1)).to(memory_format=torch.channels_last)
    mmpeft.inject(model, dict(type='FLoRA', rank=2))
    x = torch.randn(1, 8, 6, 6).to(memory_format=torch.channels_last)
    assert model(x).is_contiguous(memory_format=torch.channels_last)
    assert mmpeft.merge(model)[0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('remove', [mmpeft.merge, mmpeft.remove])
def test_removing_from_a_copy_leaves_the_original(remove):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    mmpeft.inject(model, dict(type='LoRA', rank=2))
    randomize(model)
    x = torch.randn(2, 4)
    before = model(x)
    copied = copy.deepcopy(model)
    remove(copied)
    assert torch.equal(model(x), before) and type(copied[0]) is nn.Linear
    further = copy.deepcopy(model)
    mmpeft.inject(further, dict(type='BitFit'))
    assert torch.equal(model(x), before) and torch.equal(further(x), before)


def by_path(model, empty):
    """Attach to a plain model, by path alone, what another has."""

    def attach_to(plain):
        for number, record in enumerate(model.peft):
            sites = [s for s in attached(model) if s.adapter.injection == number]
            entries = [(s.path, s.tensor, s.method, None if s.tensor else s.spec) for s in sites]
            sites = sites_at(plain, entries)
            adapt(plain, Injection(record.method, record.module, record.trained), sites, empty)
        return plain

    return attach_to


@pytest.mark.parametrize('empty', [False, True])
@pytest.mark.parametrize('method', ['lora', 'vera', 'bitfit', 'pissa', 'houlsby', 'vpt_deep'])
def test_attached_by_path_a_model_is_as_injected(method, empty):
    plain = nn.Sequential(OrderedDict(body=TransformerBlock(Attention(8), 8), head=nn.Linear(8, 3)))
    model, x = copy.deepcopy(plain), torch.randn(2, 5, 8)
    mmpeft.inject(model, METHODS[method], dict(module='body'), unfreeze='norm1')
    mmpeft.inject(model, dict(type='DoRA', rank=1), dict(include='mlp'))
    randomize(model)
    before = snapshot(plain)
    other = by_path(model, empty)(plain)
    assert [(n, p.requires_grad) for n, p in other.named_parameters()] == [
        (n, p.requires_grad) for n, p in model.named_parameters()
    ]
    values = torch.cat([p.detach().flatten() for p in adapter_parameters(other)])
    assert bool(values.isnan().all()) is empty
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    assert_same(mmpeft.remove(other), before)


@pytest.mark.parametrize(
    'entry, message',
    [
        (('backbone.2', 'weight'), "no module 'backbone.2' to adapt. Did you mean 'backbone"),
        (('backbone.0.pw', 'wight'), "'backbone.0.pw' has no weight 'wight'.*'weight'"),
        (('backbone.0.pw', 'bias'), r"LoRA is not defined on 'backbone.0.pw.bias'.*\(16,\)"),
        (('backbone.0.pw.parametrizations.weight', 'original'), 'no module'),
    ],
)
def test_paths_that_a_model_does_not_have(entry, message):
    model = Net()
    mmpeft.inject(model, dict(type='LoRA', rank=2))
    with pytest.raises(UsageError, match=message):
        sites_at(model, [(*entry, mmpeft.METHODS.build(dict(type='LoRA')), None)])


def test_adapters_of_activations_keep_their_order_and_names():
    model = nn.Sequential(OrderedDict(body=TransformerBlock(Attention(8), 8)))
    for method in ('HoulsbyAdapter', 'ParallelAdapter', 'PfeifferAdapter'):
        mmpeft.inject(model, dict(type=method, rank=2))
    randomize(model)
    x, before = torch.randn(2, 5, 8), snapshot(model)
    expected, sites = model(x), detachable(model)
    detach(sites)
    assert not attached(model) and not any('peft' in key for key in model.state_dict())
    attach(model, sites)
    assert_same(model, before)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize('method', ['BitFit', 'SSF', 'LoRA'])
def test_a_copy_of_a_parametrized_layer_leaves_the_first_alone(method):
    """A deep copy has the class of the first, on which torch puts properties."""
    first = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8))
    x = torch.randn(2, 8)
    expected, copied = first(x), copy.deepcopy(first)
    try:
        mmpeft.inject(copied, dict(type=method))
        copied(x)
    finally:
        assert torch.equal(first(x), expected)
        assert torch.equal(copy.deepcopy(first)(x), expected)
