"""Selecting weights by module, kind and pattern."""

import copy
import re

import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.injection.targets import Targets
from mmpeft.methods import Adapter
from tests.cases import randomize
from tests.networks import DeformableLike, Net, NewNorms

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


def adapted(model):
    return [
        name.split('.parametrizations')[0]
        for name, module in model.named_modules()
        if isinstance(module, Adapter)
    ]


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
        (dict(module='bakcbone'), "'bakcbone' is not a module of Net. Did you mean 'backbone'"),
        (dict(include=['head', 'backbone.0.dv']), "'backbone.0.dv' matches no weight.*'backbone.0"),
        (dict(exclude=['stem']), "pattern 'stem' matches no weight"),
        (dict(overrides={'neck': dict(rank=1)}), "'neck' matches no weight"),
        (dict(overrides={'head': dict(rnk=1)}), "no argument 'rnk'. Did you mean 'rank'"),
        (dict(kinds=['convolution']), "no kind 'convolution'.*'conv'"),
        (dict(kinds=['embedding']), 'nothing below .* is left for LoRA'),
        (dict(include=['(']), 'not a valid regular expression'),
        (dict(module=None), 'module=None must be a string'),
        (dict(max_share='x'), "max_share='x' must be a finite number or None"),
        (dict(max_share=float('nan')), 'max_share=nan must be a finite number'),
        (dict(max_share=True), 'max_share=True must be a finite number'),
        (dict(kinds=3), 'kinds=3 must be a tuple of strings or None'),
        (dict(exclude_kinds=[1]), r'exclude_kinds=\(1,\) must be a tuple of strings'),
        (dict(overrides=3), 'overrides=3 must be a dict'),
        (dict(overrides={'head': 3}), r"overrides\['head'\]=3 must be a dict of arguments"),
        ([1], r'targets=\[1\] must be a dict'),
        (dict(inclde=['x']), "no key 'inclde'. Did you mean 'include'"),
    ],
)
def test_wrong_targets_are_refused_and_change_nothing(targets, message):
    model = Net()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError, match=re.compile(message, re.DOTALL)):
        mmpeft.inject(model, dict(type='LoRA', rank=2), targets)
    assert model.state_dict().keys() == state.keys()
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, 'peft')


def test_nothing_is_unfrozen_by_none():
    model = Net()
    mmpeft.inject(model, dict(type='LoRA', rank=2), unfreeze=None)
    assert model.peft[0].trained == ()


def test_targets_name_nothing_that_is_newly_initialized():
    with pytest.raises(UsageError, match="'norm0' matches no weight"):
        mmpeft.inject(NewNorms(), dict(type='BitFit'), dict(include=['norm0']))


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


def test_third_party_convolutions():
    model = nn.Sequential(DeformableLike())
    summary = mmpeft.inject(model, dict(type='FLoRA', rank=3), dict(kinds=['conv']))
    assert summary.rows[0].shape == (6, 2, 3, 3)
    randomize(model)
    x = torch.randn(1, 4, 5, 5)
    expected = model(x)
    torch.testing.assert_close(mmpeft.merge(model)(x), expected)


def test_what_is_cleared_with_none_is_left_out():
    """Child configs of mmengine clear a key so."""
    cleared = dict(include=None, exclude=None, exclude_kinds=None, overrides=None)
    assert Targets.of(cleared) == Targets()


@pytest.mark.parametrize('share', [0, -1.0])
def test_a_share_of_nothing_is_refused(share):
    with pytest.raises(UsageError, match='max_share=.* is not above 0'):
        mmpeft.inject(Net(), dict(type='LoRA', rank=2), dict(max_share=share))
