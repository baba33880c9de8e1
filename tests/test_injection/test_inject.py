"""Injecting methods into a model, one and several."""

import copy
import warnings
from functools import cache

import pytest
import timm
import torch
from torch import nn

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.injection.site import adapter_parameters, attached
from mmpeft.injection.weights import plain_key
from mmpeft.methods import Adapter
from tests.cases import randomize
from tests.networks import Block, Net, assert_same, snapshot

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


@cache
def empty(name):
    """Without values and adapters; each test removes its own."""
    with torch.device('meta'):
        return timm.create_model(name, features_only=True)


@pytest.mark.parametrize(
    'name, method, kinds, expected',
    [
        ('convnextv2_large', dict(type='LoRA', rank=8, layout='loralib'), None, 12_946_080),
        ('convnextv2_large', dict(type='LoRA', rank=32, layout='loralib'), None, 51_784_320),
        ('convnextv2_base', dict(type='LieRA', rank=16, layout='loralib'), None, 17_271_104),
        ('convnextv2_base', dict(type='LieRA', rank=32, layout='loralib'), None, 34_542_208),
        ('convnextv2_base', dict(type='LieRA', rank=2, layout='loralib'), ('conv',), 1_797_928),
        ('convnextv2_base', dict(type='LieRA', rank=16, layout='loralib'), ('conv',), 14_383_424),
    ],
)
def test_parameter_counts_of_the_papers(name, method, kinds, expected):
    model = empty(name)
    summary = mmpeft.inject(model, method, dict(kinds=kinds))
    mmpeft.remove(model)
    assert summary.adapters == expected
    assert summary.base == {'convnextv2_large': 196_416_768, 'convnextv2_base': 87_690_752}[name]


ATTENTION = dict(method=dict(type='LoRA', rank=2), targets=dict(module='backbone', kinds='linear'))


SEVERAL = dict(
    disjoint=[ATTENTION, dict(method=dict(type='BitFit'), targets=dict(module='backbone'))],
    on_one_weight=[ATTENTION, dict(ATTENTION, method=dict(type='DoRA', rank=1))],
    unfrozen=[
        dict(ATTENTION, unfreeze=r'0\.norm', method=dict(type='Frozen')),
        dict(ATTENTION, unfreeze=r'1\.norm\.bias$|fc1\.weight$'),
    ],
    modules=[
        dict(method=dict(type='LoRA', rank=2), targets=dict(module='backbone.0')),
        dict(method=dict(type='BitFit'), targets=dict(module='backbone.1')),
    ],
)


class MixedNet(nn.Module):
    """Convolutions, linear layers and norms below a backbone, and a head."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(Block(), Block())
        for block in self.backbone:
            block.fc1 = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        for block in self.backbone:
            x = block(x)
            x = x + block.fc1(x.movedim(1, -1)).movedim(-1, 1).tanh()
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize('name', SEVERAL)
def test_several_injections(name, tmp_path):
    model, x = MixedNet().double(), torch.randn(2, 8, 4, 4, dtype=torch.float64)
    base = copy.deepcopy(model)
    before = snapshot(model)
    trains = set()
    for injection in SEVERAL[name]:
        summary = mmpeft.inject(model, **injection)
        trains |= {f'{injection["targets"]["module"]}.{n}' for n in model.peft[-1].trained}
        plain = {plain_key(n): p for n, p in model.named_parameters()}
        assert all(plain[n].requires_grad for n in trains)
    adapters = {id(p) for p in adapter_parameters(model)}
    inside = [p for p in model.backbone.parameters() if p.requires_grad]
    assert {id(p) for p in inside} == adapters | {id(plain[n]) for n in trains}
    assert summary.adapters == sum(p.numel() for p in adapter_parameters(model))
    assert summary.unfrozen == sum(plain[n].numel() for n in trains)
    assert summary.base == sum(p.numel() for p in base.backbone.parameters())
    assert summary.outside == sum(p.numel() for p in base.head.parameters())
    randomize(model, 0.1)
    with torch.no_grad():
        for key in trains:
            plain[key].add_(0.1)
    model.eval()
    expected = model(x)
    path = mmpeft.save_adapter(model, tmp_path / 'a.safetensors')
    loaded = mmpeft.load_adapter(copy.deepcopy(base), path).eval()
    assert torch.equal(loaded(x), expected)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    mmpeft.merge(model, reversible=True)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    mmpeft.unmerge(model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(x), expected)
    mmpeft.remove(model)
    assert snapshot(model.train())['modes'] == before['modes']
    assert snapshot(model)['objects'] == before['objects']
    for key, value in model.state_dict().items():
        assert key in trains or torch.equal(value, before['state'][key])


def test_an_injection_may_unfreeze_what_an_earlier_one_adapts():
    model = Net()
    mmpeft.inject(model, dict(type='LoRA', rank=2), dict(module='backbone'))
    mmpeft.inject(model, dict(type='Frozen'), dict(module='backbone'), unfreeze=r'^0\.pw\.weight$')
    assert model.peft[1].trained == ('0.pw.weight',)
    assert model.backbone[0].pw.parametrizations.weight.original.requires_grad
    mmpeft.inject(model, dict(type='BitFit'), dict(module='backbone.0'))
    assert model.backbone[0].pw.parametrizations.weight.original.requires_grad


@pytest.mark.parametrize('first, second', [('Full', 'LoRA'), ('BitFit', 'Full')])
@pytest.mark.parametrize('modules', [('backbone', 'backbone.0'), ('backbone.0', 'backbone')])
def test_full_is_refused_beside_adapters(first, second, modules):
    model = Net()
    mmpeft.inject(model, dict(type=first), dict(module=modules[0]))
    before = snapshot(model)
    with pytest.raises(UsageError, match='Full trains all of its target, so .*unfreeze'):
        mmpeft.inject(model, dict(type=second), dict(module=modules[1]))
    assert_same(model, before)
    mmpeft.inject(model, dict(type=second), dict(module='head'))


def test_the_warning_of_oversized_adapters_is_of_one_injection():
    model = Net()
    with pytest.warns(UserWarning, match=r'3 of 7 adapters .*: 1,764 for 392'):
        mmpeft.inject(model, dict(type='LoRA', rank=4, layout='loralib'))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        mmpeft.inject(model, dict(type='LoRA', rank=1), dict(kinds='linear'))


def test_methods_compose_on_one_model_and_on_one_weight():
    model, x = Net().double().eval(), torch.randn(2, 8, 6, 6, dtype=torch.float64)
    plain = copy.deepcopy(model)
    mmpeft.inject(model, dict(type='LoRA', rank=2), dict(module='backbone'))
    mmpeft.inject(model, dict(type='BitFit'), dict(module='backbone'))
    mmpeft.inject(model, dict(type='FLoRA', rank=2, update='lie'), dict(kinds=['linear']))
    mmpeft.inject(model, dict(type='LieRA', rank=1, layout='loralib'), dict(kinds=['linear']))
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {
        id(p) for m in model.modules() if isinstance(m, Adapter) for p in m.parameters()
    }
    randomize(model, 0.1)
    expected = model(x)
    chain = model.head.parametrizations.weight
    torch.testing.assert_close(chain[1](chain[0](chain.original)), model.head.weight)
    mmpeft.merge(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize('empty', [False, True])
def test_what_follows_from_the_weights_follows_from_those_of_the_base(empty):
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    size = torch.cat([p.detach().flatten() for p in (model[0].weight, model[1].weight)])
    expected = float(f'{1 / size.square().mean().sqrt().item():.1e}')
    for rank in (2, 1):
        mmpeft.inject(
            model,
            dict(type='LieRA', rank=rank),
            dict(overrides={'0': dict(scale=3.0)}),
            empty=empty,
        )
    assert [record.method.scale for record in model.peft] == [expected] * 2
    methods = [site.method for site in attached(model)]
    assert [(m.rank, m.scale) for m in methods] == [
        (2, 3.0),
        (1, 3.0),
        (2, expected),
        (1, expected),
    ]


def test_layers_without_a_shape_are_refused_until_the_first_input():
    net = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 4))
    with pytest.raises(UsageError, match=r'2 parameters, such as 0\.weight.*Call the model once'):
        mmpeft.inject(net, dict(type='LoRA', rank=2))
    net(torch.ones(1, 3))
    assert len(mmpeft.inject(net, dict(type='LoRA', rank=2)).rows) == 2


@pytest.mark.parametrize('kind', [nn.Embedding, nn.EmbeddingBag])
def test_embeddings_with_sparse_gradients_are_refused(kind):
    model = nn.Sequential(kind(9, 4, sparse=True), nn.Linear(4, 4))
    targets = dict(kinds=('embedding', 'linear'))
    with pytest.raises(UsageError, match=r"'0'\)\.sparse = False"):
        mmpeft.inject(model, dict(type='LoRA', rank=1), targets)
    assert not hasattr(model, 'peft')
    model[0].sparse = False
    mmpeft.inject(model, dict(type='LoRA', rank=1), targets)
    model(torch.randint(9, (3, 2))).sum().backward()


@pytest.mark.parametrize(
    'arguments',
    [dict(method=dict(type='Full')), dict(method=dict(type='LoRA', rank=1), unfreeze='1')],
)
def test_weights_that_train_in_few_digits_cause_a_warning(arguments):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).bfloat16()
    with pytest.warns(UserWarning, match=r'weights train in torch.bfloat16, such as \d\.\w+, in'):
        mmpeft.inject(model, **arguments)


def test_adapters_of_weights_in_few_digits_cause_none(recwarn):
    mmpeft.inject(nn.Sequential(nn.Linear(4, 4)).bfloat16(), dict(type='LoRA', rank=1))
    assert not [w for w in recwarn if 'weights train' in str(w.message)]


@pytest.mark.filterwarnings('ignore:Initializing zero-element tensors')
@pytest.mark.parametrize('method', ['FLoRA', 'LoRA', 'LoKr', 'SHiRA', 'RepAdapter', 'OFT', 'IA3'])
def test_weights_without_elements_are_left_alone(method):
    """timm's classifiers of no classes end in such a layer."""
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 0), nn.Conv2d(0, 4, 1))
    mmpeft.inject(model, dict(type=method))
    assert {site.path for site in attached(model)} == {'0'}
    assert model[:2](torch.randn(3, 32)).shape == (3, 0)
