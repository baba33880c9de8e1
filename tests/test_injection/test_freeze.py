"""What is frozen, what trains, and statistics."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.injection.freeze import Injection, freeze_target, plain_parameters
from mmpeft.injection.site import adapter_parameters
from tests.networks import Net, NewNorms, Tied, assert_same, snapshot

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


def names_of(parameters, model):
    wanted = {id(p) for p in parameters}
    return {name for name, p in model.named_parameters() if id(p) in wanted}


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


@pytest.mark.parametrize('method', ['LoRA', 'BitFit', 'Frozen', 'Full'])
@pytest.mark.parametrize('unfreeze', [(), r'norm0'])
def test_what_is_newly_initialized_trains_under_every_method(method, unfreeze, tmp_path):
    model = nn.Sequential(OrderedDict(backbone=NewNorms(), head=nn.Linear(9, 3)))
    base = copy.deepcopy(model)
    for parameter in model.backbone.norm0.parameters():
        parameter.requires_grad_(False)
    summary = mmpeft.inject(model, dict(type=method), dict(module='backbone'), unfreeze)
    new = {f'backbone.{norm}.{name}' for norm in ('norm0', 'norm1') for name in ('weight', 'bias')}
    trained = names_of((p for p in model.parameters() if p.requires_grad), model)
    own = names_of(adapter_parameters(model), model)
    if method != 'Full':
        assert trained == new | own | {'head.weight', 'head.bias'}
        assert summary.unfrozen == 4 * 8
        assert set(model.peft[0].trained) == {n.removeprefix('backbone.') for n in new}
    assert new <= trained and not any('norm0' in name or 'norm1' in name for name in own)
    assert not any('.norm0' in row.name or '.norm1' in row.name for row in summary.rows)
    model.train()(torch.randn(4, 8, 3, 3))
    assert model.backbone.norm1.num_batches_tracked == 1
    assert model.backbone.blocks[0].norm.num_batches_tracked == (method == 'Full')
    stored = mmpeft.adapter_state_dict(model)
    assert new | {f'backbone.norm1.{b}' for b in ('running_mean', 'running_var')} <= stored.keys()
    x = torch.randn(4, 8, 3, 3)
    loaded = mmpeft.load_adapter(base, mmpeft.save_adapter(model, tmp_path / 'a.safetensors'))
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    mmpeft.remove(model)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == [
        'backbone.norm0.weight',
        'backbone.norm0.bias',
    ]


def test_newly_initialized_names_what_there_is():
    model = NewNorms()
    model.newly_initialized = ('norm0', 'norm2')
    with pytest.raises(UsageError, match=r"NewNorms\.newly_initialized names 'norm2'"):
        mmpeft.inject(model, dict(type='LoRA'))
    assert not hasattr(model, 'peft')


def test_a_name_that_is_not_there_is_refused_and_changes_nothing():
    model = Net()
    before = snapshot(model)
    method = mmpeft.METHODS.build(dict(type='Frozen'))
    with pytest.raises(UsageError, match=r"'backbone' has no parameter '0.nrm.bias'.*'0.norm.bias"):
        freeze_target(model, Injection(method, 'backbone', ('0.norm.weight', '0.nrm.bias')))
    assert_same(model, before)
    assert not hasattr(model, 'peft')


def test_the_record_names_parameters_of_the_plain_model():
    model = Net()
    model.backbone[0].norm.bias.requires_grad_(False)
    mmpeft.inject(model, dict(type='LoRA', rank=1), dict(module='backbone.1', include='pw'))
    mmpeft.inject(model, dict(type='BitFit'), dict(module='backbone'), unfreeze=r'0\.norm')
    first, second = model.peft
    assert first.module == 'backbone.1' and first.trained == first.frozen_before == ()
    assert 'backbone.1.pw.weight' in first.trained_before
    assert second.trained == ('0.norm.weight', '0.norm.bias')
    assert second.frozen_before == ('backbone.0.norm.bias',)
    assert all(name.startswith('backbone.0.') for name in second.trained_before)
    assert not {'backbone.0.norm.weight', 'backbone.0.norm.bias'} & set(second.trained_before)
    assert all('parametrizations' not in name for name in second.trained_before)
    mmpeft.remove(model)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == [
        'backbone.0.norm.bias'
    ]


def test_a_tied_parameter_has_all_its_names():
    model = Tied()
    mmpeft.inject(
        model, dict(type='LoRA', rank=1), dict(include='embed', kinds='embedding'), unfreeze='out'
    )
    assert model.peft[0].trained == ('out.weight',)
    assert plain_parameters(model).keys() == {'embed.weight', 'out.weight'}
    assert plain_parameters(model)['embed.weight'].requires_grad


@pytest.mark.parametrize('averaged', [False, True])
def test_update_bn_leaves_frozen_statistics(averaged):
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    network[1].running_mean.fill_(5.0)
    mmpeft.inject(network, dict(type='LoRA', rank=2))
    before = {name: value.clone() for name, value in network[1].named_buffers()}
    if averaged:
        network = torch.optim.swa_utils.AveragedModel(network)
    with pytest.warns(UserWarning, match='statistics of frozen norms stay as they are'):
        torch.optim.swa_utils.update_bn([torch.randn(2, 3, 8, 8)], network)
    norm = network.module[1] if averaged else network[1]
    assert norm.running_mean.eq(5).all() and torch.equal(norm.running_var, before['running_var'])
