"""Several adapters on one base: switching between them leaves the base unchanged."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.injection.site import adapter_parameters
from tests.adapters import ADAPTERS, BACKBONE, LORA, assert_equal_states, trained
from tests.cases import BLOCKS, randomize
from tests.networks import Tied, assert_same, snapshot

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


@pytest.mark.parametrize('first, second', pairwise([*ADAPTERS, next(iter(ADAPTERS))]))
def test_one_after_the_other_and_none_equal_three_models(adapters, models, base, x, first, second):
    for _ in range(2):
        for name in (first, second):
            model = adapters.use(name)
            assert adapters.current == name and model is adapters.model
            assert torch.equal(model(x), models[name](x))
            assert_equal_states(model, models[name])
        assert torch.equal(adapters.use(None)(x), base(x))
        assert_equal_states(adapters.model, base)


def test_the_base_comes_back_with_all_its_state(base, files):
    model = copy.deepcopy(base)
    model.neck.requires_grad_(False)
    model.backbone[0].norm.train()
    model.backbone[0].norm.weight.requires_grad_(False)
    before = snapshot(model)
    adapters = mmpeft.AdapterLibrary(model)
    for name, path in files.items():
        adapters.load(name, path)
        assert_same(model, before)
    for name in files:
        adapters.use(name)
        adapters.use(None)
        assert_same(model, before)


@pytest.mark.parametrize('name', ADAPTERS)
def test_in_use_it_is_as_a_normally_adapted_model(adapters, models, base, x, name, tmp_path):
    model = adapters.use(name)
    assert str(mmpeft.summary(model)) == str(mmpeft.summary(models[name]))
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == [
        (n, p.requires_grad) for n, p in models[name].named_parameters()
    ]
    for saved in (mmpeft.save_adapter(model, tmp_path / 'a.safetensors'), None):
        adapters.use(None)
        saved = saved or adapters.save(name, tmp_path / 'b.safetensors')
        assert adapters.current is None
        fresh = mmpeft.load_adapter(copy.deepcopy(base), saved)
        assert torch.equal(fresh(x), models[name](x))
    if name != 'houlsby':
        merged = mmpeft.merge(copy.deepcopy(models[name]))
        assert_equal_states(mmpeft.merge(adapters.use(name), reversible=True), merged)
        with pytest.raises(UsageError, match='unmerge'):
            adapters.use(None)
        mmpeft.unmerge(adapters.model)
    assert torch.equal(adapters.use('coco')(x), models['coco'](x))
    assert_equal_states(adapters.use(None), base)


def test_training_in_use_is_kept_and_touches_nothing_else(adapters, models, base, x):
    twin = trained(base, ADAPTERS['dota'], x, 0)
    for network in (twin, adapters.use('dota')):
        network.load_state_dict(models['dota'].state_dict())
    optimizers = {
        network: torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 0.05, 0.9)
        for network in (twin, adapters.model)
    }
    for _ in range(3):
        for network, optimizer in optimizers.items():
            optimizer.zero_grad()
            network.train()(x).square().mean().backward()
            optimizer.step()
        adapters.use('coco').eval()(x)
        adapters.use('dota')
    assert torch.equal(adapters.model.eval()(x), twin.eval()(x))
    assert not torch.equal(twin(x), models['dota'](x))
    assert torch.equal(adapters.use('coco')(x), models['coco'](x))
    assert_equal_states(adapters.use(None), base)


def test_a_new_adapter_is_trained_beside_the_others(adapters, models, base, x):
    twin = copy.deepcopy(base)
    torch.manual_seed(5)
    mmpeft.inject(twin, **ADAPTERS['dota'])
    adapters.use('coco')
    torch.manual_seed(5)
    summary = adapters.inject('new', **ADAPTERS['dota'])
    assert adapters.current == 'coco' and str(summary) == str(mmpeft.summary(twin))
    assert_equal_states(adapters.use('new'), twin)
    model = adapters.model
    with torch.no_grad():
        assert torch.equal(model(x), base(x))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model(x).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model(x), base(x))
    assert torch.equal(adapters.use('coco')(x), models['coco'](x))
    assert_equal_states(adapters.use(None), base)


def test_ties_hold_in_every_adapter(adapters):
    for name in (None, *adapters):
        model = adapters.use(name)
        if name == 'whole':
            chains = model.head.parametrizations.weight, model.twin.parametrizations.weight
            assert chains[0].original is chains[1].original and chains[0][0] is chains[1][0]
        else:
            assert model.head.weight is model.twin.weight


def test_shared_factors_stay_shared(adapters, models):
    adapters.use('coco')
    model = adapters.use('vera')
    count = len({id(p) for p in adapter_parameters(model)})
    assert count == len({id(p) for p in adapter_parameters(models['vera'])})


def test_tied_weights_in_the_target(tmp_path):
    base, index = Tied().double(), torch.arange(9)
    networks, adapters = {}, mmpeft.AdapterLibrary(copy.deepcopy(base))
    for name, include in dict(a=('out', 'embed'), b=('out',)).items():
        networks[name] = copy.deepcopy(base)
        mmpeft.inject(
            networks[name], LORA['method'], dict(kinds=('linear', 'embedding'), include=include)
        )
        randomize(networks[name])
        adapters.load(name, mmpeft.save_adapter(networks[name], tmp_path / f'{name}.safetensors'))
    networks[None] = base
    for name in ('a', 'b', None, 'b', 'a', None):
        assert torch.equal(adapters.use(name)(index), networks[name](index))
    assert adapters.model.embed.weight is adapters.model.out.weight


@pytest.mark.parametrize(
    'method', [dict(type='VPT', tokens=2, deep=True), dict(type='ParallelAdapter', rank=2)]
)
def test_methods_on_activations_that_meet_at_one_place(method, tmp_path):
    layer = BLOCKS['vit']
    base, x = layer.build(), layer.input()
    both = trained(base, [dict(method=method), dict(method=dict(type='HoulsbyAdapter', rank=2))], x)
    one = trained(base, dict(method=method), x)
    adapters = mmpeft.AdapterLibrary(copy.deepcopy(base).eval())
    adapters.load('both', mmpeft.save_adapter(both, tmp_path / 'both.safetensors'))
    adapters.load('one', mmpeft.save_adapter(one, tmp_path / 'one.safetensors'))
    for _ in range(2):
        assert torch.equal(adapters.use('both')(x), both(x))
        assert_equal_states(adapters.model, both)
        assert torch.equal(adapters.use('one')(x), one(x))
        assert torch.equal(adapters.use(None)(x), base.eval()(x))


def test_the_base_is_held_once(base, files):
    model = copy.deepcopy(base)
    own = {id(t) for t in model.state_dict(keep_vars=True).values()}
    pointers = [p.data_ptr() for p in model.backbone.parameters()]
    adapters = mmpeft.AdapterLibrary(model)
    for name in ('coco', 'dota'):
        adapters.load(name, files[name])
    state = adapters.use('dota').state_dict(keep_vars=True)
    added = {key for key, value in state.items() if id(value) not in own}
    assert added == mmpeft.adapter_state_dict(model).keys()
    adapters.use(None)
    assert [p.data_ptr() for p in model.backbone.parameters()] == pointers


@pytest.mark.parametrize('in_use', [None, 'coco', 'dota'])
def test_conversion_reaches_what_is_not_in_use(adapters, models, base, x, in_use):
    adapters.use(in_use).float()
    for name in ('dota', 'coco', None):
        model = adapters.use(name)
        y = model(x.float())
        assert y.dtype == torch.float32
        torch.testing.assert_close(
            y.double(), (models | {None: base})[name](x), rtol=1e-3, atol=1e-4
        )
    head = adapters.use('coco').head
    assert head.weight.dtype == torch.float32 and head.weight.requires_grad


def test_weights_that_torch_keeps_are_built_anew(adapters, models, base, x):
    with parametrize.cached(), torch.no_grad():
        for name in ('coco', 'whole', None, 'coco'):
            torch.testing.assert_close(
                adapters.use(name)(x), (models | {None: base})[name](x), rtol=0, atol=0
            )


def test_names(adapters):
    assert adapters.names == list(ADAPTERS) == list(adapters)
    assert len(adapters) == len(ADAPTERS) and 'coco' in adapters and 'nano' not in adapters


def test_removing(adapters, base, models, x):
    adapters.use('coco')
    adapters.remove('coco')
    assert adapters.current is None and 'coco' not in adapters
    assert_equal_states(adapters.model, base)
    adapters.use('dota')
    adapters.remove('vera')
    assert adapters.current == 'dota' and torch.equal(adapters.model(x), models['dota'](x))
    for call in (adapters.use, adapters.remove):
        with pytest.raises(UsageError, match="no adapter 'coc'"):
            call('coc')


@pytest.mark.parametrize(
    'call, message',
    [
        (lambda a, f: a.use('dotta'), "no adapter 'dotta'. Did you mean 'dota'"),
        (lambda a, f: a.save('cocoo', 'x'), "Did you mean 'coco'"),
        (lambda a, f: a.load('coco', f['coco']), "There is an adapter 'coco' already"),
        (lambda a, f: a.load(None, f['coco']), 'must be a non-empty string, not None'),
        (lambda a, f: a.load('new', 'none.safetensors'), 'no adapter file'),
        (lambda a, f: a.inject('new', LORA['method'], dict(module='bakbone')), "'backbone'"),
        (lambda a, f: a.inject('coco', LORA['method']), 'already'),
        (lambda a, f: a.combine('coco', dict(dota=1)), 'already'),
        (lambda a, f: a.combine('mix', dict(cocoa=1)), "Did you mean 'coco'"),
        (lambda a, f: a.combine('mix', {}), 'needs adapters'),
        (lambda a, f: a.combine('mix', dict(coco=float('nan'))), "weight of 'coco' .* is nan"),
        (lambda a, f: a.combine('mix', dict(coco='1')), "weight of 'coco' .* is '1'"),
        (lambda a, f: a.combine('mix', dict(coco=1), heads='cocos'), "heads='cocos'.*'coco'"),
        (lambda a, f: a.combine('mix', dict(houlsby=0.5, coco=0.5)), 'HoulsbyAdapter.*weight 1'),
    ],
)
def test_what_is_refused_changes_nothing(adapters, files, call, message):
    for in_use in (None, 'dota'):
        before, names = snapshot(adapters.use(in_use)), adapters.names
        with pytest.raises(UsageError, match=message):
            call(adapters, files)
        assert adapters.names == names and adapters.current == in_use
        assert_same(adapters.model, before)


def test_another_base_is_refused_with_both_fingerprints(base, files):
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.backbone[0].pw.weight[0, 0, 0, 0] += 1e-12
    before = snapshot(other)
    adapters = mmpeft.AdapterLibrary(other)
    with pytest.raises(UsageError, match=r'another frozen base: fingerprint \w{16} .* \w{16} in'):
        adapters.load('coco', files['coco'])
    assert_same(other, before)
    assert not adapters.names
    adapters.load('coco', files['coco'], check_base=False)
    weight = other.backbone[0].pw.weight.clone()
    adapters.use('coco')
    assert torch.equal(adapters.use(None).backbone[0].pw.weight, weight)


def test_files_of_other_heads_do_not_fit(base, files):
    other = copy.deepcopy(base)
    other.head = nn.Linear(6, 11).double()
    before = snapshot(other)
    with pytest.raises(UsageError, match=r'head\.bias'):
        mmpeft.AdapterLibrary(other).load('coco', files['coco'])
    assert_same(other, before)


def test_an_adapted_model_is_no_base(models):
    with pytest.raises(UsageError, match='plain base'):
        mmpeft.AdapterLibrary(models['coco'])


def test_nor_is_one_of_which_a_part_or_the_whole_was_adapted(models):
    for path, method in (('backbone', 'LoRA'), ('', 'LoRA'), ('head', 'Frozen')):
        model = mmpeft.remove(copy.deepcopy(models['coco']))
        mmpeft.inject(model.get_submodule(path), dict(type=method))
        before = snapshot(model)
        with pytest.raises(UsageError, match='plain base'):
            mmpeft.AdapterLibrary(model if path else model.backbone)
        assert_same(model, before)


@pytest.mark.parametrize(
    'change',
    [
        mmpeft.merge,
        mmpeft.remove,
        lambda model: mmpeft.inject(model, dict(type='IA3'), BACKBONE),
    ],
)
def test_what_was_changed_by_other_means_is_noticed(adapters, change):
    change(adapters.use('coco'))
    for call in (
        lambda: adapters.use('dota'),
        lambda: adapters.use('coco'),
        lambda: adapters.remove('coco'),
    ):
        with pytest.raises(UsageError, match='by other means'):
            call()
