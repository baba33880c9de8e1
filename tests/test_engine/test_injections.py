"""The injections of PEFTHook's arguments, and arguments that follow a checkpoint."""

import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.checkpoint.manifest import describe
from mmpeft.engine.injections import inject_all, injections
from mmpeft.errors import UsageError
from mmpeft.injection.site import attached
from mmpeft.methods.lora import LoRA

LORA = dict(type='LoRA', rank=2)


def net():
    torch.manual_seed(0)
    model = nn.Module()
    model.backbone = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 8))
    return model


def test_one_method_and_several():
    targets = dict(include=['a'], max_share=0.5)
    assert injections(LORA) == [dict(method=LORA, targets=dict(module='backbone'), unfreeze=())]
    found = injections(
        [LORA, dict(method=dict(type='BitFit'), targets=dict(include=['b']), unfreeze='c')],
        targets,
        ['d'],
    )
    assert [each['targets'] for each in found] == [
        dict(module='backbone', include=['a'], max_share=0.5),
        dict(module='backbone', include=['b'], max_share=0.5),
    ]
    assert [each['unfreeze'] for each in found] == [['d'], 'c']
    assert injections(LoRA(rank=2))[0]['method'] == LoRA(rank=2)


@pytest.mark.parametrize(
    'method, message',
    [
        ([], 'names no method'),
        ([dict(targets={})], 'An entry of a list of methods'),
        ([dict(method=LORA, target={})], 'An entry of a list of methods'),
        ([LORA, dict(type='Bitfit')], "Did you mean 'BitFit'"),
        ([dict(method=LORA, targets=dict(inclde=['a']))], "'include'"),
        ([dict(method=LORA, targets='neck')], "targets='neck' must be a dict"),
        ('LoRA', 'A method is a dict'),
        ([dict(method=LORA, targets=[1])], r'targets=\[1\] must be a dict'),
    ],
)
def test_what_is_wrong(method, message):
    with pytest.raises(UsageError, match=message):
        injections(method)


def after(method, manifest, **targets):
    """The method of the first adapter of a model that a checkpoint will be loaded into."""
    model = net()
    inject_all(model, injections(method, targets), manifest=manifest)
    return mmpeft.summary(model).rows and next(
        m.method for m in model.modules() if hasattr(m, 'spec')
    )


@pytest.mark.parametrize(
    'trained, config, expected',
    [
        (dict(rank=3), dict(), dict(rank=3)),
        (dict(rank=3, layout='loralib'), dict(rank=3), dict(rank=3, layout='loralib')),
        (dict(rank=3, scale=2.0), dict(rank=3), dict(rank=3, scale=2.0)),
        (dict(rank=3, alpha=6.0), dict(), dict(rank=3, alpha=6.0)),
        # What the config gives, and what only training knows, is the config's.
        (dict(rank=3), dict(rank=2), dict(rank=2)),
        (dict(rank=3, scale=2.0), dict(alpha=6.0), dict(rank=3, alpha=6.0)),
        (dict(rank=3, dropout=0.5), dict(), dict(rank=3, dropout=0.0)),
    ],
)
def test_open_arguments_follow_the_checkpoint(trained, config, expected):
    model = net()
    mmpeft.inject(model, dict(type='LoRA', **trained), dict(module='backbone'))
    for kind in ('LoRA', LoRA):  # a class, as mmengine's configs in Python have it
        assert after(dict(type=kind, **config), describe(model)) == LoRA(**expected)


def test_an_automatic_scale_is_that_of_the_checkpoint():
    """Though it would be another one on the weights as they are now."""
    model = net()
    with torch.no_grad():
        model.backbone[2].weight.mul_(100)
    mmpeft.inject(model, dict(type='LieRA', rank=2), dict(module='backbone'))
    (stored,) = {m.method.scale for m in model.modules() if hasattr(m, 'spec')}
    assert after(dict(type='LieRA', rank=2), describe(model)).scale == stored
    assert after(dict(type='LieRA', rank=2), None).scale != stored


def test_a_budget_is_spent_again():
    model = net()
    mmpeft.inject(model, dict(type='LoRA', budget=200), dict(module='backbone'))
    found = after(dict(type='LoRA', budget=200), describe(model))
    assert found.rank == model.peft[0].method.rank > 1


def test_another_method_follows_nothing():
    model = net()
    mmpeft.inject(model, LORA, dict(module='backbone'))
    assert after(dict(type='DoRA'), describe(model)).rank == 8


def test_memory_of_all_injections():
    model = net()
    with pytest.warns(UserWarning, match="memory='small' finds no blocks in Sequential"):
        inject_all(model, injections([LORA, LORA]), memory='small')
    assert [record.memory for record in model.peft] == ['small', 'small']


def test_ranks_by_sensitivity_are_those_of_the_checkpoint():
    model, other = net(), net()
    mmpeft.inject(model, LORA, dict(module='backbone', overrides={'^0': dict(rank=1)}))
    budget, targets = dict(type='LoRA', budget=500), dict(overrides=None)
    inject_all(other, injections(budget, targets, sensitivity=1), describe(model))
    assert [site.method.rank for site in attached(other)] == [1, 2]
