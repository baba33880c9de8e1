"""What a manifest states, and adapters that are attached by it."""

import copy

import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.checkpoint import plain_data
from mmpeft.checkpoint.adapter_file import read_adapter
from mmpeft.checkpoint.manifest import attach_adapters, describe
from mmpeft.errors import UsageError
from mmpeft.injection import insertion_points, targets
from mmpeft.injection.site import attached, named_adapters
from tests.cases import randomize
from tests.fixtures.v030.network import base, images

LORA, LOTR = dict(type='LoRA', rank=2), dict(type='LoTR', rank=2)


def injection(method, unfreeze=(), **targets):
    return dict(method=method, targets=dict(module='backbone') | targets, unfreeze=unfreeze)


CASES = dict(
    one=('mixed', [injection(LORA)]),
    tied=('tied', [injection(LORA, include=['mlp'])]),
    tied_in_part=('tied', [injection(LORA, include=['mlp']), injection(LORA, include=['0.mlp'])]),
    on_one_weight=('mixed', [injection(LORA, include=['mlp']), injection(dict(type='IA3'))]),
    shared=('mixed', [injection(LOTR)]),
    shared_apart=('mixed', [injection(LOTR, include=[f'{i}.mlp']) for i in (0, 1)]),
    shared_twice=('mixed', [injection(LOTR, include=['mlp']), injection(LOTR, include=['mlp'])]),
    vpt=('mixed', [injection(dict(type='VPT', tokens=2))]),
    border=('conv', [injection(dict(type='VPT', deep=True))]),
    activations=(
        'mixed',
        [
            injection(dict(type='HoulsbyAdapter', rank=2)),
            injection(dict(type='ParallelAdapter', rank=2)),
        ],
    ),
    beside=('mixed', [injection(dict(type='PfeifferAdapter', rank=2)), injection(LORA, ['norm'])]),
    ranks=('mixed', [injection(LORA, overrides={'mlp': dict(rank=3, alpha=6)}, max_share=0.5)]),
    budget=('mixed', [injection(dict(type='FLoRA', budget='1k'))]),
    lie=('mixed', [injection(dict(type='LieRA', rank=2))]),
    biases=('mixed', [injection(dict(type='BitFit')), injection(LORA, kinds=['linear'])]),
    full=('mixed', [injection(dict(type='Full'))]),
    frozen=('mixed', [injection(dict(type='Frozen'), ['norm'])]),
    modules=('mixed', [injection(LORA, module='backbone.fc'), injection(LORA, module='head')]),
)


def adapted(network, injections):
    model = base(network)
    for arguments in injections:
        mmpeft.inject(model, **arguments)
    if named_adapters(model):
        randomize(model)
    return model.eval()


def sharing(model):
    """Keys of each tensor that has several."""
    held = {}
    for key, value in model.state_dict(keep_vars=True).items():
        held.setdefault(id(value), []).append(key)
    return sorted(keys for keys in held.values() if len(keys) > 1)


@pytest.mark.filterwarnings('ignore:.*adapters have more parameters')
@pytest.mark.parametrize('name', CASES)
def test_attaching_by_path_gives_the_same_model(name, tmp_path, monkeypatch):
    network, injections = CASES[name]
    model = adapted(network, injections)
    path = mmpeft.save_adapter(model, tmp_path / 'a.safetensors')

    def fail(*_, **__):
        raise AssertionError('searched')

    monkeypatch.setattr(targets, 'select', fail)
    monkeypatch.setattr(insertion_points.Search, 'find', fail)
    loaded = mmpeft.load_adapter(base(network), path).eval()
    assert describe(loaded) == describe(model)
    assert sharing(loaded) == sharing(model)
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    for (key, a), (_, b) in zip(loaded.named_parameters(), model.named_parameters(), strict=True):
        assert a.requires_grad == b.requires_grad, key
    assert torch.equal(loaded(images()), model(images()))
    own, others = ([(s.name, s.method, s.spec) for s in attached(m)] for m in (model, loaded))
    assert own == others


@pytest.fixture
def path(tmp_path):
    model = adapted('mixed', [injection(LORA, include=['mlp'])])
    return mmpeft.save_adapter(model, tmp_path / 'a.safetensors')


def test_a_path_that_is_missing_is_named(path):
    model = base('mixed')
    model.backbone.blocks[1].mlp = nn.Identity()
    with pytest.raises(UsageError, match=r"no module 'backbone\.blocks\.1\.mlp\.0' to adapt"):
        mmpeft.load_adapter(model, path)
    model.backbone.blocks[1].mlp = nn.ModuleList([nn.Module()])
    with pytest.raises(UsageError, match=r"'backbone\.blocks\.1\.mlp\.0' has no weight 'weight'"):
        mmpeft.load_adapter(model, path)
    assert not hasattr(model, 'peft')


def test_a_weight_of_another_shape_is_named(path):
    model = base('mixed')
    model.backbone.blocks[1].mlp[0] = nn.Linear(8, 12)
    with pytest.raises(UsageError, match=r'blocks\.1\.mlp\.0.*lora_B.*\(16, 2\).*\(12, 2\)'):
        mmpeft.load_adapter(model, path)
    assert not hasattr(model, 'peft')


def test_the_scale_of_a_lie_update_is_that_of_the_file(tmp_path):
    model = adapted('mixed', [injection(dict(type='LieRA', rank=2))])
    path = mmpeft.save_adapter(model, tmp_path / 'a.safetensors')
    other = base('mixed')
    with torch.no_grad():
        for parameter in other.backbone.parameters():
            parameter.mul_(3)
    loaded = mmpeft.load_adapter(other, path, check_base=False)
    scales = {site.method.scale for site in attached(loaded)}
    assert scales == {site.method.scale for site in attached(model)} and None not in scales


def test_methods_are_stored_once(path):
    manifest, _ = read_adapter(path)
    assert len(manifest['methods']) == 1 and len(manifest['adapters']) == 6


def test_a_copy_has_the_same_manifest_and_a_combination_none(path):
    model = mmpeft.load_adapter(base('mixed'), path)
    assert describe(copy.deepcopy(model)) == describe(model)
    library = mmpeft.AdapterLibrary(base('mixed'))
    library.load('a', path)
    library.combine('b', dict(a=0.5))
    with pytest.raises(UsageError, match='no file of its own'):
        describe(library.use('b'))


def test_attaching_leaves_values_open(path):
    model = base('mixed')
    attach_adapters(model, read_adapter(path)[0])
    factors = [f for a in named_adapters(model).values() for f in a.parameters()]
    assert factors and all(factor.isnan().all() for factor in factors)


def test_the_mode_of_a_file_follows_the_umask(path):
    expected = path.parent / 'expected'
    expected.touch()
    for file in (path, path.with_name(f'{path.name}.json')):
        assert file.stat().st_mode == expected.stat().st_mode


def test_what_is_written_can_be_read(tmp_path, monkeypatch):
    """Limits on what is read hold for what is written, so that training is not lost."""

    def many(injections):
        model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(injections)))
        for number in range(injections):
            mmpeft.inject(model, dict(type='LoRA', rank=1), dict(include=rf'^{number}\.'))
        return model

    model = many(40)
    file = mmpeft.save_adapter(model, tmp_path / 'a.safetensors')
    mmpeft.load_adapter(mmpeft.remove(model), file)
    assert len(model.peft) == 40
    monkeypatch.setattr(plain_data, 'LONGEST', 100)
    with pytest.raises(UsageError, match='The manifest has .* more than 100'):
        mmpeft.save_adapter(many(1), tmp_path / 'b.safetensors')
    assert not (tmp_path / 'b.safetensors').exists()
