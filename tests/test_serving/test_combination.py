"""Combinations: weighted sums of adapters on one base."""

import copy

import pytest
import torch

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.injection.site import adapter_parameters
from mmpeft.methods import Adapter
from tests.adapters import ADAPTERS, assert_equal_states
from tests.networks import assert_same, snapshot

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


def dense(model, path):
    return model.get_submodule(path).weight.detach()


@pytest.mark.parametrize('heads', [None, 'coco', 'dota'])
def test_a_combination_is_the_weighted_sum(adapters, models, base, x, heads):
    weights = dict(coco=0.7, dota=0.5, bias=-0.2)
    adapters.combine('mix', weights, heads)
    model = adapters.use('mix')
    for path in ('backbone.0.pw', 'backbone.1.dw', 'backbone.0.norm'):
        frozen = dense(base, path)
        expected = frozen + sum(w * (dense(models[n], path) - frozen) for n, w in weights.items())
        torch.testing.assert_close(dense(model, path), expected, rtol=1e-12, atol=1e-13)
    for key in ('head.weight', 'neck.1.running_var', 'neck.0.bias'):
        own = base.state_dict()[key]
        expected = own + sum(w * (models[n].state_dict()[key] - own) for n, w in weights.items())
        expected = expected if heads is None else models[heads].state_dict()[key]
        torch.testing.assert_close(model.state_dict()[key], expected, rtol=1e-12, atol=1e-13)
    assert model.head.weight is model.twin.weight
    for name in ('coco', 'dota', 'bias'):
        assert torch.equal(adapters.use(name)(x), models[name](x))
    assert_equal_states(adapters.use(None), base)


@torch.no_grad()
def test_a_combination_of_one_is_that_one(adapters, models, x):
    for name in ('coco', 'vera', 'whole', 'bias', 'houlsby', 'full', 'heads'):
        adapters.combine(f'only {name}', {name: 1.0})
        y = adapters.use(f'only {name}')(x)
        torch.testing.assert_close(y, models[name](x), rtol=1e-12, atol=1e-13)


def test_an_adapter_on_activations_beside_weights(adapters, models, x):
    adapters.combine('mix', dict(houlsby=1.0, coco=1.0), heads='houlsby')
    y = adapters.use('mix')(x)
    twin = copy.deepcopy(adapters.use('coco'))
    mmpeft.merge(twin)
    mmpeft.inject(twin, **ADAPTERS['houlsby'])
    twin.load_state_dict(mmpeft.adapter_state_dict(models['houlsby']), strict=False)
    torch.testing.assert_close(y, twin(x), rtol=1e-12, atol=1e-13)


def test_a_combination_of_combinations(adapters, x):
    adapters.combine('half', dict(coco=0.5, dota=0.5))
    adapters.combine('mix', dict(half=0.5, whole=0.5))
    adapters.combine('flat', dict(coco=0.25, dota=0.25, whole=0.5))
    y = adapters.use('mix')(x)
    torch.testing.assert_close(adapters.use('flat')(x), y, rtol=1e-12, atol=1e-13)


def test_a_combination_merges_and_unmerges_and_has_no_file(adapters, base, x, tmp_path):
    adapters.combine('mix', dict(coco=0.7, vera=0.3))
    model = adapters.use('mix')
    y, before = model(x), snapshot(model)
    torch.testing.assert_close(mmpeft.merge(model, reversible=True)(x), y, rtol=1e-12, atol=1e-13)
    mmpeft.unmerge(model)
    assert_same(model, before)
    assert any('0.7 LoRA(rank=2) + 0.3 VeRA' in row.method for row in mmpeft.summary(model).rows)
    for save in (lambda p: mmpeft.save_adapter(model, p), lambda p: adapters.save('mix', p)):
        with pytest.raises(UsageError, match='no file of its own'):
            save(tmp_path / 'mix.safetensors')
    assert not list(tmp_path.iterdir())
    assert_equal_states(adapters.use(None), base)


def test_a_combination_holds_no_copies_and_does_not_train(adapters):
    pointers = {p.data_ptr() for p in adapter_parameters(adapters.use('coco'))}
    adapters.combine('mix', dict(coco=0.5, dota=0.5))
    model = adapters.use('mix')
    combined = [p for m in model.modules() if isinstance(m, Adapter) for p in m.parameters()]
    assert pointers <= {p.data_ptr() for p in combined}
    assert not any(p.requires_grad for p in combined)
    adapters.remove('coco')
    assert 'mix' in adapters and adapters.current == 'mix'
