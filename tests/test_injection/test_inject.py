"""Selecting, injecting, removing and merging."""

import copy
import re

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.injection.ranks import largest, parse_count
from mmpeft.methods import Adapter
from tests.cases import randomize
from tests.networks import DeformableLike, Net, Tied

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


def adapted(model):
    return [
        name.split('.parametrizations')[0]
        for name, module in model.named_modules()
        if isinstance(module, Adapter)
    ]


@pytest.mark.parametrize(
    'name, method, kinds, expected',
    [
        ('convnextv2_large', dict(type='LoRA', rank=8), None, 12_946_080),
        ('convnextv2_large', dict(type='LoRA', rank=16), None, 25_892_160),
        ('convnextv2_large', dict(type='LoRA', rank=32), None, 51_784_320),
        ('convnextv2_base', dict(type='LieRA', rank=16), None, 17_271_104),
        ('convnextv2_base', dict(type='LieRA', rank=32), None, 34_542_208),
        ('convnextv2_base', dict(type='LieRA', rank=2), ('conv',), 1_797_928),
        ('convnextv2_base', dict(type='LieRA', rank=4), ('conv',), 3_595_856),
        ('convnextv2_base', dict(type='LieRA', rank=8), ('conv',), 7_191_712),
        ('convnextv2_base', dict(type='LieRA', rank=16), ('conv',), 14_383_424),
    ],
)
def test_parameter_counts_of_the_papers(name, method, kinds, expected):
    with torch.device('meta'):
        model = timm.create_model(name, features_only=True)
    summary = mmpeft.inject(model, method | dict(layout='loralib'), dict(kinds=kinds))
    assert summary.adapters == expected
    assert summary.base == {'convnextv2_large': 196_416_768, 'convnextv2_base': 87_690_752}[name]


def test_the_summary_says_what_was_adapted_and_what_was_left():
    model = Net()
    summary = mmpeft.inject(
        model, dict(type='LoRA', rank=2), dict(module='backbone', exclude_kinds=['depthwise'])
    )
    assert adapted(model) == ['backbone.0.pw', 'backbone.0.out', 'backbone.1.pw', 'backbone.1.out']
    assert [row.name for row in summary.rows] == [f'{name}.weight' for name in adapted(model)]
    assert summary.skipped == {'depthwise': 2, 'norm': 2}
    assert summary.outside == 27
    own = sum(p.numel() for p in Net().backbone.parameters())
    assert summary.base == own
    assert summary.share == summary.adapters / own
    assert str(summary.adapters) in str(summary).replace(',', '')
    assert summary.to_dict() == mmpeft.summary(model).to_dict()


@pytest.mark.parametrize(
    'targets, expected',
    [
        (dict(module='backbone.1', kinds='depthwise'), ['backbone.1.dw']),
        (dict(kinds=['linear']), ['head']),
        (dict(kinds=['pointwise']), ['backbone.0.pw', 'backbone.1.pw']),
        (dict(include=r'0\.(dw|out)'), ['backbone.0.dw', 'backbone.0.out']),
        (dict(kinds=['conv'], exclude=[r'\.1\.', 'dw']), ['backbone.0.pw', 'backbone.0.out']),
    ],
)
def test_targets_select(targets, expected):
    model = Net()
    mmpeft.inject(model, dict(type='LoRA', rank=2), targets)
    assert adapted(model) == expected


@pytest.mark.parametrize(
    'targets, message',
    [
        (dict(module='bakcbone'), "'bakcbone' is no sub-module of Net. Did you mean 'backbone'"),
        (dict(include=['head', 'backbone.0.dv']), "'backbone.0.dv' matches no weight.*'backbone.0"),
        (dict(exclude=['stem']), "pattern 'stem' matches no weight"),
        (dict(overrides={'neck': dict(rank=1)}), "'neck' matches no weight"),
        (dict(overrides={'head': dict(rnk=1)}), "no argument 'rnk'. Did you mean 'rank'"),
        (dict(kinds=['convolution']), "no kind 'convolution'.*'conv'"),
        (dict(kinds=['embedding']), 'nothing below .* is left for LoRA'),
        (dict(include=['(']), 'no regular expression'),
        (dict(inclde=['x']), "no key 'inclde'. Did you mean 'include'"),
    ],
)
def test_targets_that_cannot_be_met_are_told_and_change_nothing(targets, message):
    model = Net()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError, match=re.compile(message, re.DOTALL)):
        mmpeft.inject(model, dict(type='LoRA', rank=2), targets)
    assert model.state_dict().keys() == state.keys()
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, 'peft')


def test_a_rank_for_every_mode_must_fit_every_weight():
    model = Net()
    with pytest.raises(UsageError, match=r'rank=\(2, 2, 2\) does not fit a weight of shape'):
        mmpeft.inject(model, dict(type='FLoRA', rank=(2, 2, 2)))
    assert all(p.requires_grad for p in model.parameters()) and not adapted(model)


def test_overrides_of_rank_and_scale_by_pattern():
    model = Net()
    targets = dict(
        module='backbone',
        kinds=['conv'],
        overrides={r'^1\.': dict(rank=4), r'1\.dw': dict(rank=1, scale=0.5)},
    )
    mmpeft.inject(model, dict(type='LoRA', rank=2, layout='channel'), targets)
    methods = [m.method for m in model.modules() if isinstance(m, Adapter)]
    assert [(m.rank, m.scaling) for m in methods] == [
        (2, 1),
        (2, 1),
        (2, 1),
        (1, 0.5),
        (4, 1),
        (4, 1),
    ]


@given(budget=st.integers(600, 60_000), layout=st.sampled_from(['loralib', 'channel']))
@settings(max_examples=25, deadline=None)
def test_a_budget_gives_the_largest_rank_that_fits(budget, layout):
    with torch.device('meta'):
        model = Net()

    def size(rank):
        used = mmpeft.inject(model, dict(type='LoRA', rank=rank, layout=layout)).adapters
        mmpeft.remove(model)
        return used

    if size(1) > budget:
        with pytest.raises(UsageError, match='is too small'):
            mmpeft.inject(model, dict(type='LoRA', budget=budget, layout=layout))
        return
    summary = mmpeft.inject(model, dict(type='LoRA', budget=budget, layout=layout))
    rank = model.peft[0].method.rank
    mmpeft.remove(model)
    assert summary.adapters == size(rank) <= budget
    assert rank == 16 or size(rank + 1) > budget


@given(st.integers(0, 60), st.integers(0, 60), st.integers(-5, 70))
def test_bisection(low, span, limit):
    high = low + span
    expected = max([low, *(n for n in range(low, high + 1) if n <= limit)])
    assert largest(lambda n: n <= limit, low, high) == expected


@pytest.mark.parametrize(
    'text, count', [('12.9M', 12_900_000), ('300k', 300_000), (7, 7), ('1_000', 1000), ('2G', 2e9)]
)
def test_counts_with_units(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize('text', ['', 'many', '-3', 0, 'M', '1.2.3k'])
def test_no_counts(text):
    with pytest.raises(UsageError, match='no number of parameters'):
        parse_count(text)


def test_a_rank_that_no_mode_allows():
    with pytest.raises(UsageError, match="rank=40.*largest possible is 16, at 'backbone"):
        mmpeft.inject(Net(), dict(type='FLoRA', rank=40))


def test_an_adapter_that_outgrows_its_weight_is_told_and_can_be_capped():
    model = Net()
    with pytest.warns(UserWarning, match=r'3 of 7 adapters .*backbone\.\d\.dw'):
        mmpeft.inject(model, dict(type='LoRA', rank=4, layout='loralib'))
    mmpeft.remove(model)
    method = dict(type='LoRA', rank=4, layout='loralib')
    summary = mmpeft.inject(model, method, dict(max_share=0.5))
    for row in summary.rows:
        rank_1 = 'rank=1,' in row.method
        assert row.adapter <= 0.5 * row.weight or rank_1
    assert len({row.method for row in summary.rows}) > 1


def test_frozen_statistics_survive_train_and_copies_and_end_with_the_adapters():
    model = Net()
    mmpeft.inject(model, dict(type='LoRA', rank=2), dict(module='backbone'))
    x = torch.randn(4, 8, 6, 6)
    for net in (model, copy.deepcopy(model)):
        before = net.backbone[0].norm.running_mean.clone()
        net.train()
        net(x)
        assert torch.equal(net.backbone[0].norm.running_mean, before)
        assert isinstance(net.backbone[0].norm, nn.BatchNorm2d)
        assert net.backbone[0].norm.num_batches_tracked == 0
    mmpeft.merge(model)
    assert type(model.backbone[0].norm) is nn.BatchNorm2d
    model.train()(x)
    assert model.backbone[0].norm.num_batches_tracked == 1


def test_unfreeze():
    model = Net()
    mmpeft.inject(model, dict(type='Frozen'), dict(module='backbone'), unfreeze=[r'1\.norm'])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        'backbone.1.norm.weight',
        'backbone.1.norm.bias',
        'head.weight',
        'head.bias',
    }
    assert mmpeft.adapter_state_dict(model).keys() == trained


def test_methods_compose_on_one_model_and_on_one_weight():
    model, x = Net().double().eval(), torch.randn(2, 8, 6, 6, dtype=torch.float64)
    plain = copy.deepcopy(model)
    mmpeft.inject(model, dict(type='LoRA', rank=2), dict(module='backbone'))
    mmpeft.inject(model, dict(type='BitFit'), dict(module='backbone'))
    mmpeft.inject(model, dict(type='FLoRA', rank=2, update='lie'), dict(kinds=['linear']))
    mmpeft.inject(model, dict(type='LieRA', rank=1), dict(kinds=['linear']))
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


def test_third_party_convolutions():
    model = nn.Sequential(DeformableLike())
    summary = mmpeft.inject(model, dict(type='FLoRA', rank=3), dict(kinds=['conv']))
    assert summary.rows[0].shape == (6, 2, 3, 3)
    randomize(model)
    x = torch.randn(1, 4, 5, 5)
    expected = model(x)
    torch.testing.assert_close(mmpeft.merge(model)(x), expected)


def test_merging_refuses_nan():
    model = nn.Sequential(nn.Linear(3, 3))
    mmpeft.inject(model, dict(type='LoRA', rank=1))
    with torch.no_grad():
        model[0].parametrizations.weight[0].lora_B.fill_(float('nan'))
    with pytest.raises(UsageError, match=r'merged 0\.weight has NaN'):
        mmpeft.merge(model)
    assert parametrize.is_parametrized(model[0])


def test_the_layout_of_memory_is_kept():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1)).to(memory_format=torch.channels_last)
    mmpeft.inject(model, dict(type='FLoRA', rank=2))
    x = torch.randn(1, 8, 6, 6).to(memory_format=torch.channels_last)
    assert model(x).is_contiguous(memory_format=torch.channels_last)
    assert mmpeft.merge(model)[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_removing_from_a_plain_model_does_nothing():
    model = Net()
    assert mmpeft.remove(model) is model and mmpeft.merge(model) is model


@pytest.mark.parametrize('take_off', [mmpeft.merge, mmpeft.remove])
def test_taking_adapters_off_a_copy_leaves_the_original(take_off):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    mmpeft.inject(model, dict(type='LoRA', rank=2))
    randomize(model)
    x = torch.randn(2, 4)
    before = model(x)
    copied = copy.deepcopy(model)
    take_off(copied)
    assert torch.equal(model(x), before) and type(copied[0]) is nn.Linear
    further = copy.deepcopy(model)
    mmpeft.inject(further, dict(type='BitFit'))
    assert torch.equal(model(x), before) and torch.equal(further(x), before)
