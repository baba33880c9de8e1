"""Models that share the memory of their frozen weights."""

import copy

import pytest
import torch
from torch import nn

import mmpeft

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


@pytest.mark.parametrize(
    'release',
    [
        mmpeft.merge,
        mmpeft.remove,
        lambda model: mmpeft.inject(mmpeft.remove(model), dict(type='Full')),
        lambda model: mmpeft.inject(model, dict(type='BitFit'), unfreeze=['2.weight']),
    ],
)
def test_training_one_model_leaves_the_others_alone(release):
    def network():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.LayerNorm(6), nn.Linear(6, 3))
        mmpeft.inject(model, dict(type='LoRA', rank=2), dict(include=['^0']))
        return model

    models, x = dict(a=network(), b=network()), torch.randn(4, 6)
    assert mmpeft.share_base(models) > 0
    expected, before = models['b'](x), models['a'](x)
    release(models['a'])
    optimizer = torch.optim.SGD([p for p in models['a'].parameters() if p.requires_grad], 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        models['a'](x).square().sum().backward()
        optimizer.step()
    assert torch.equal(models['b'](x), expected) and not torch.equal(models['a'](x), before)


def test_memory_that_is_shared_again_is_parted_again():
    models = {}
    for name in 'ab':
        torch.manual_seed(0)
        models[name] = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
        mmpeft.inject(models[name], dict(type='LoRA', rank=2), dict(include=['^0']))
    x = torch.randn(4, 6)
    for _ in range(2):
        assert mmpeft.share_base(models) > 0
        expected = models['b'](x)
        mmpeft.remove(models['a'])
        models['a'](x).square().sum().backward()
        with torch.no_grad():
            for parameter in models['a'].parameters():
                parameter.sub_(parameter.grad)
        assert torch.equal(models['b'](x), expected)
        models['a'].load_state_dict(mmpeft.remove(copy.deepcopy(models['b'])).state_dict())
        mmpeft.inject(models['a'], dict(type='LoRA', rank=2), dict(include=['^0']))
