"""Merging all or nothing, and back to the last bit."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.injection.merge import MERGED
from mmpeft.injection.site import adapter_parameters
from mmpeft.methods import ActivationMethod
from tests.cases import KINDS, LAYERS, METHODS, randomize
from tests.networks import Net, Tied, assert_same, snapshot

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CHEAP = ('linear', 'conv1d', 'conv2d', 'depthwise', 'transposed2d', 'embedding', 'attention')
LORA = dict(type='LoRA', rank=2)
mmpeft.METHODS.import_from_location()


def merges(config):
    kind = mmpeft.METHODS.get(config['type'])
    return kind.adapts and not issubclass(kind, ActivationMethod)


def inject(model, config):
    mmpeft.inject(model, config, dict(kinds=None if config['type'] == 'BitFit' else KINDS))
    randomize(model, 0.1)


@pytest.mark.parametrize(
    'number, method', enumerate(name for name, config in METHODS.items() if merges(config))
)
def test_unmerging_is_exact_in_every_dtype(number, method, subtests):
    """On every layer, each in another dtype."""
    for turn, name in enumerate(CHEAP):
        with subtests.test(name):
            assert_unmerging_is_exact(LAYERS[name], method, DTYPES[(number + turn) % 4])


def assert_unmerging_is_exact(layer, method, dtype):
    model = layer.build(dtype)
    inject(model, METHODS[method])
    before, peft, adapted = snapshot(model), model.peft, model(x := layer.input(dtype))
    merged = copy.deepcopy(mmpeft.merge(model, reversible=True)).state_dict()
    assert not any('parametrizations' in key for key in merged)
    original = {k: v for k, v in before['state'].items() if not k.endswith('original')}
    assert any(not torch.equal(v, original.get(k, torch.empty(0))) for k, v in merged.items())
    assert mmpeft.unmerge(model) is model
    assert_same(model, before)
    assert model.peft is peft and MERGED not in model.__dict__
    assert torch.equal(model(x), adapted)


@pytest.fixture
def model():
    model = Net()
    mmpeft.inject(model, LORA, dict(module='backbone'))
    mmpeft.inject(model, dict(type='BitFit'), dict(module='backbone'))
    mmpeft.inject(model, dict(type='DoRA', rank=2), dict(module='backbone'))
    mmpeft.inject(model, dict(type='LieRA', rank=1), dict(module='head'))
    randomize(model, 0.1)
    return model


def test_merging_reversibly_merges_as_for_good(model):
    other = mmpeft.merge(copy.deepcopy(model))
    mmpeft.merge(model, reversible=True)
    merged = model.state_dict()
    assert merged.keys() == other.state_dict().keys()
    assert all(torch.equal(value, merged[key]) for key, value in other.state_dict().items())


@pytest.mark.parametrize('method', ['lora', 'liera', 'dora', 'ssf'])
@pytest.mark.parametrize('dtype', [torch.complex64, torch.complex128])
def test_complex_weights(method, dtype):
    model, x = nn.Sequential(nn.Linear(4, 5)).to(dtype), torch.randn(3, 4, dtype=dtype)
    inject(model, METHODS[method])
    expected = model(x)
    torch.testing.assert_close(mmpeft.merge(model)(x), expected)


def test_training_goes_on_as_if_nothing_had_been(model):
    x = torch.randn(4, 8, 6, 6)
    twin = copy.deepcopy(model).train()
    before = snapshot(model.train())
    optimizers = [
        torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1, 0.9)
        for net in (model, twin)
    ]
    for _ in range(3):
        for net, optimizer in zip((model, twin), optimizers, strict=True):
            if net is model:
                mmpeft.merge(net, reversible=True)
                net.eval()(x)
                mmpeft.unmerge(net).train()
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    after = snapshot(model)
    assert after['objects'] == before['objects'] and after['modes'] == before['modes']
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q), name
    originals = [key for key in before['state'] if key.endswith('original') or 'running' in key]
    assert originals
    assert all(torch.equal(after['state'][key], before['state'][key]) for key in originals)


def test_statistics_stay_while_merged_reversibly(model):
    before = snapshot(model)
    mmpeft.merge(model, reversible=True).train()(torch.randn(4, 8, 6, 6))
    assert not any(p.requires_grad for p in model.parameters())
    assert_same(mmpeft.unmerge(model), before)


def test_single_modules_keep_their_modes():
    model = Net()
    model.backbone[0].norm.eval()
    model.backbone[1].pw.eval()
    modes = [(name, m.training) for name, m in model.named_modules()]
    for take_off in (mmpeft.merge, mmpeft.remove):
        mmpeft.inject(model, LORA, dict(module='backbone'))
        take_off(model)
        assert [(name, m.training) for name, m in model.named_modules()] == modes


def test_the_order_of_parameters_is_that_of_the_base(model):
    names = list(Net().state_dict())
    assert list(mmpeft.remove(copy.deepcopy(model)).state_dict()) == names
    assert list(mmpeft.merge(model).state_dict()) == names


@pytest.mark.parametrize('dtype', DTYPES)
def test_converting_while_merged(model, dtype):
    base = mmpeft.remove(copy.deepcopy(model)).to(dtype)
    mmpeft.merge(model, reversible=True)
    kept = [site.adapter for site in model.__dict__[MERGED].sites]
    adapters = [id(p) for adapter in kept for p in adapter.parameters()]
    mmpeft.unmerge(model.to(dtype))
    assert adapters == [id(p) for p in adapter_parameters(model)]
    assert {a.dtype for a in kept} == {torch.promote_types(torch.float32, dtype)}
    x = torch.randn(2, 8, 6, 6, dtype=dtype)
    assert model.eval()(x).dtype == dtype
    removed = mmpeft.remove(model).state_dict()
    assert all(torch.equal(value, removed[key]) for key, value in base.state_dict().items())


def test_a_copy_of_a_merged_model_comes_apart_by_itself(model):
    before = snapshot(model)
    mmpeft.merge(model, reversible=True)
    copied = copy.deepcopy(model)
    randomize(mmpeft.unmerge(copied))
    merged = snapshot(model)
    assert_same(model, merged)
    assert_same(mmpeft.unmerge(model), before)
    state = copied.state_dict()
    for key in (k for k in state if k.endswith('original')):
        assert torch.equal(state[key], before['state'][key])


def test_what_is_kept_aside_is_held_once_and_not_in_the_state_dict(model):
    original = model.backbone[0].pw.parametrizations.weight.original
    before = original.data_ptr()
    mmpeft.merge(model, reversible=True)
    assert list(model.state_dict()) == list(Net().state_dict())
    layer = model.backbone[0].pw
    found = model.__dict__[MERGED].originals
    (kept,) = [p for owner, name, p in found if owner is layer and name == 'weight']
    assert kept is original and kept.data_ptr() == before


def test_a_second_merge_is_for_good(model):
    mmpeft.merge(model, reversible=True)
    merged = {key: value.clone() for key, value in model.state_dict().items()}
    assert mmpeft.merge(model) is model
    assert all(torch.equal(value, merged[key]) for key, value in model.state_dict().items())
    assert [type(m) for m in model.modules()] == [type(m) for m in Net().modules()]
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(UsageError, match='nothing to unmerge'):
        mmpeft.unmerge(model)


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('through', [lambda m: m, copy.deepcopy])
def test_loading_into_merged_weights_warns(model, through):
    state = Net().state_dict()
    mmpeft.merge(model, reversible=True)
    model = through(model)
    with pytest.warns(UserWarning, match=r'backbone.0.dw.weight, are merged reversibly') as caught:
        model.load_state_dict(state)
    assert len(caught) == 1 and caught[0].filename == __file__
    model.load_state_dict(model.state_dict() | {'head.bias': state['head.bias']})
    mmpeft.merge(model)
    model.load_state_dict(state)


def test_adapting_what_was_merged_reversibly(model):
    base = mmpeft.remove(copy.deepcopy(model)).state_dict()
    mmpeft.merge(model, reversible=True)
    mmpeft.inject(model, LORA, dict(module='backbone'))
    randomize(model)
    with pytest.raises(UsageError, match='adapted or parametrized since'):
        mmpeft.unmerge(model)
    with pytest.raises(UsageError, match='already reversibly merged'):
        mmpeft.merge(model, reversible=True)
    x = torch.randn(2, 8, 6, 6)
    other = copy.deepcopy(model).eval()
    expected = other(x)
    torch.testing.assert_close(mmpeft.merge(other)(x), expected, rtol=1e-4, atol=1e-4)
    assert all(p.requires_grad for p in other.parameters())
    removed = mmpeft.remove(model)
    assert all(torch.equal(value, base[key]) for key, value in removed.state_dict().items())
    assert [type(m) for m in model.modules()] == [type(m) for m in Net().modules()]
    assert all(p.requires_grad for p in model.parameters())


def test_removing_after_a_reversible_merge(model):
    base = mmpeft.remove(copy.deepcopy(model)).state_dict()
    removed = mmpeft.remove(mmpeft.merge(model, reversible=True)).state_dict()
    assert list(removed) == list(base)
    assert all(torch.equal(value, base[key]) for key, value in removed.items())


def adapter_at(model, place):
    return [m for m in model.modules() if isinstance(m, mmpeft.methods.Adapter)][place]


@pytest.mark.parametrize('reversible', [False, True])
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
@pytest.mark.parametrize('place, name', [(0, r'backbone\.0\.dw\.weight'), (-1, r'head\.weight')])
def test_a_bad_weight_leaves_all_as_it_was(model, place, name, value, reversible):
    with torch.no_grad():
        next(adapter_at(model, place).parameters()).fill_(value)
    before = snapshot(model)
    with pytest.raises(UsageError, match=f'merged {name} has NaN or infinite'):
        mmpeft.merge(model, reversible)
    assert_same(model, before)
    assert len(model.peft) == 4


def test_a_weight_beyond_its_dtype_is_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).half()
    mmpeft.inject(model, LORA)
    with torch.no_grad():
        for parameter in adapter_at(model, -1).parameters():
            parameter.fill_(400.0)
    before = snapshot(model)
    with pytest.raises(UsageError, match=r'merged 1\.weight reaches 3\.2e\+05, .*float16 cannot'):
        mmpeft.merge(model)
    assert_same(model, before)
    mmpeft.merge(model.bfloat16())


def test_tied_weights_are_merged_once_and_stay_tied():
    model, index = Tied(), torch.arange(9)
    mmpeft.inject(model, LORA, dict(kinds=('linear', 'embedding')))
    randomize(model)
    before, adapted = snapshot(model), model(index)
    mmpeft.merge(model, reversible=True)
    assert model.out.weight is model.embed.weight
    torch.testing.assert_close(model(index), adapted)
    mmpeft.unmerge(model)
    assert_same(model, before)
    chains = model.out.parametrizations.weight, model.embed.parametrizations.weight
    assert chains[0].original is chains[1].original and chains[0][0] is chains[1][0]
    assert torch.equal(model(index), adapted)


@pytest.mark.parametrize(
    'kind, other, name', [('linear', 'embed', 'out'), ('embedding', 'out', 'embed')]
)
def test_a_tied_weight_that_one_of_its_layers_reads_without_the_adapter(kind, other, name):
    model = Tied()
    with pytest.raises(UsageError, match=f'{name}.weight is also {other}.weight'):
        mmpeft.inject(model, LORA, dict(kinds=kind))
    mmpeft.inject(model, LORA, dict(kinds=kind, include=name))
    before = snapshot(model)
    with pytest.raises(UsageError, match='are one tied weight'):
        mmpeft.merge(model, reversible=True)
    assert_same(model, before)


def test_models_that_share_weights_are_merged_apart():
    model = Net()
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    x = torch.randn(2, 8, 6, 6)
    expected = twin.eval()(x)
    mmpeft.inject(model, LORA, dict(module='backbone'))
    randomize(model)
    mmpeft.merge(model)
    assert torch.equal(twin(x), expected)


def test_what_cannot_be_unmerged():
    with pytest.raises(UsageError, match='nothing to unmerge'):
        mmpeft.unmerge(Net())
    model = Net()
    mmpeft.inject(model, LORA)
    mmpeft.merge(model, reversible=True)
    parametrize.register_parametrization(model.head, 'weight', nn.Identity())
    with pytest.raises(UsageError, match='parametrized since'):
        mmpeft.unmerge(model)
    parametrize.remove_parametrizations(model.head, 'weight', leave_parametrized=False)
    mmpeft.unmerge(model)


def test_a_plain_model_stays_plain():
    model = Net()
    assert mmpeft.merge(model, reversible=True) is model
    assert MERGED not in model.__dict__


def test_merging_refuses_nan():
    model = nn.Sequential(nn.Linear(3, 3))
    mmpeft.inject(model, dict(type='LoRA', rank=1))
    with torch.no_grad():
        model[0].parametrizations.weight[0].lora_B.fill_(float('nan'))
    with pytest.raises(UsageError, match=r'merged 0\.weight has NaN'):
        mmpeft.merge(model)
    assert parametrize.is_parametrized(model[0])


def test_removing_from_a_plain_model_does_nothing():
    model = Net()
    assert mmpeft.remove(model) is model and mmpeft.merge(model) is model


def test_what_needs_adapters_says_that_they_are_merged(tmp_path):
    model = Net()
    mmpeft.inject(model, LORA)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    mmpeft.merge(model, reversible=True)
    for use in (
        lambda: mmpeft.save_adapter(model, tmp_path / 'a.safetensors'),
        lambda: mmpeft.monitor(model, optimizer),
    ):
        with pytest.raises(
            UsageError, match=r'no adapters\. They are merged: call mmpeft\.unmerge'
        ):
            use()


@pytest.mark.parametrize('where', ['cpu', 'folder'])
def test_frozen_weights_may_wait_elsewhere(model, where, tmp_path):
    def mapped():
        return str(tmp_path) in Path('/proc/self/maps').read_text()

    x = torch.randn(2, 8, 6, 6)
    adapted, state = model(x), copy.deepcopy(model.state_dict())
    trains = [p.requires_grad for p in model.parameters()]
    with mmpeft.merged(model, tmp_path if where == 'folder' else where) as inside:
        assert inside is model and mapped() == (where == 'folder')
        torch.testing.assert_close(model(x), adapted)
        own = {p.data_ptr() for p in model.parameters()}
        assert not own & {p.data_ptr() for *_, p in model.__dict__[MERGED].originals}
        copied = copy.deepcopy(model)
    for each in (model, mmpeft.unmerge(copied)):
        assert torch.equal(each(x), adapted) and list(each.state_dict()) == list(state)
        assert all(torch.equal(value, state[key]) for key, value in each.state_dict().items())
    assert not [path for path in tmp_path.rglob('*') if path.is_file()]
    del copied
    assert not mapped()
    assert [p.requires_grad for p in model.parameters()] == trains


def test_merged_ends_with_an_error_too(model):
    before = snapshot(model)
    with pytest.raises(KeyError), mmpeft.merged(model):
        raise KeyError
    assert_same(model, before)


def test_a_tied_weight_waits_elsewhere_once():
    model, index = Tied(), torch.arange(9)
    mmpeft.inject(model, LORA, dict(kinds=('linear', 'embedding')))
    randomize(model)
    adapted = model(index)
    with mmpeft.merged(model, offload='cpu'):
        originals = [original for *_, original in model.__dict__[MERGED].originals]
        assert originals[0] is originals[1]
    assert torch.equal(model(index), adapted)
    chains = model.out.parametrizations.weight, model.embed.parametrizations.weight
    assert chains[0].original is chains[1].original


def test_a_folder_that_cannot_be_written_leaves_all_as_it_was(model, tmp_path):
    (tmp_path / 'file').write_text('')
    before = snapshot(model)
    for place in ('file', 'cuda'):
        with pytest.raises(OSError, match=place):
            mmpeft.merge(model, reversible=True, offload=tmp_path / place)
        assert_same(model, before)
    with pytest.raises(UsageError, match='Only a merge with reversible=True'):
        mmpeft.merge(model, offload='cpu')
    assert_same(model, before)
