"""What holds for every method on every kind of layer or network, in float64."""

import copy

import pytest
import torch
from torch.func import functional_call

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.injection.site import adapter_parameters
from mmpeft.methods import ActivationMethod, Adapter, Method
from tests.cases import BLOCKS, KINDS, LAYERS, METHODS, NO_IDENTITY, NO_PLACE, randomize

mmpeft.METHODS.import_from_location()
ACTING = {n for n, m in mmpeft.METHODS.module_dict.items() if issubclass(m, ActivationMethod)}
ON_WEIGHTS = [
    (name, method)
    for name in LAYERS
    for method, config in METHODS.items()
    if config['type'] not in ACTING
]
ON_ACTIVATIONS = [
    (name, method)
    for name in BLOCKS
    for method, config in METHODS.items()
    if config['type'] in ACTING and (config['type'], name) not in NO_PLACE
]
EVERYWHERE = ON_WEIGHTS + ON_ACTIVATIONS


def starts_as_identity(case):
    name, method = case
    return (METHODS[method]['type'], name) not in NO_IDENTITY


def over(cases):
    """Let a test run over some pairs of a layer and a method."""
    return pytest.mark.parametrize('case', cases, ids='-'.join, indirect=True)


@pytest.fixture(params=EVERYWHERE, ids='-'.join)
def case(request):
    return request.param


@pytest.fixture
def layer(case):
    return (LAYERS | BLOCKS)[case[0]]


@pytest.fixture
def config(case):
    return METHODS[case[1]]


@pytest.fixture
def plain(layer):
    return layer.build()


@pytest.fixture
def model(plain, config):
    adapted = copy.deepcopy(plain)
    inject(adapted, config)
    return adapted


pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


def inject(model, config):
    kinds = None if config['type'] in ACTING | {'BitFit'} else KINDS
    return mmpeft.inject(model, config, dict(kinds=kinds))


def train(model, x, steps=3, lr=0.05):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr) if trained else None
    for _ in range(steps if optimizer else 0):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def test_every_registered_method_has_a_case():
    missing = set(mmpeft.METHODS.module_dict) - {case['type'] for case in METHODS.values()}
    assert not missing, f'add a line to tests/cases.py for {missing}'
    assert all(issubclass(m, Method) for m in mmpeft.METHODS.module_dict.values())


@over([case for case in EVERYWHERE if starts_as_identity(case)])
@torch.no_grad()
def test_identity_at_start_to_the_last_bit(plain, model, layer, config):
    # Attention picks its kernel by whether its weights require a gradient.
    plain.requires_grad_(config['type'] == 'Full')
    x = layer.input()
    assert torch.equal(model(x), plain(x))
    assert torch.equal(model.eval()(x), plain.eval()(x))


def test_adapters_are_there(model, config):
    adapters = [m for m in model.modules() if isinstance(m, Adapter)]
    assert bool(adapters) is mmpeft.METHODS.build(config).adapts
    assert all(list(adapter.parameters()) for adapter in adapters)


def test_gradients_against_finite_differences(model, layer):
    randomize(model)
    adapters = {id(p) for p in adapter_parameters(model)}
    names = [n for n, p in model.named_parameters() if id(p) in adapters]
    values = [dict(model.named_parameters())[n].detach().requires_grad_() for n in names]
    x = layer.input()

    def output(*parameters):
        return functional_call(model, dict(zip(names, parameters, strict=True)), (x,))

    if names:
        assert torch.autograd.gradcheck(output, values, fast_mode=True)


@over(ON_WEIGHTS)
def test_merged_equals_attached(model, plain, layer):
    randomize(model)
    x = layer.input()
    attached = model(x)
    mmpeft.merge(model)
    assert set(model.state_dict()) == set(plain.state_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    torch.testing.assert_close(model(x), attached, rtol=1e-10, atol=1e-10)


@over(ON_ACTIVATIONS)
def test_merging_is_refused_and_leaves_the_model_as_it_was(model, layer):
    randomize(model)
    x, modes = layer.input(), [m.training for m in model.modules()]
    state, attached = copy.deepcopy(model.state_dict()), model(x)
    with pytest.raises(UsageError, match='cannot be merged'):
        mmpeft.merge(model)
    assert [m.training for m in model.modules()] == modes
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(x), attached)


def test_only_adapters_receive_gradients(model, layer, config):
    loss = model(layer.input()).square().mean()
    if loss.requires_grad:
        loss.backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    adapters = {id(p) for p in adapter_parameters(model)}
    if config['type'] == 'Full':
        assert with_gradient == set(dict(model.named_parameters()))
    else:
        assert with_gradient == {n for n, p in model.named_parameters() if id(p) in adapters}


def test_every_adapter_parameter_moves_in_training(model, layer):
    named = dict(model.named_parameters(remove_duplicate=False))
    before = {name: p.detach().clone() for name, p in named.items() if p.requires_grad}
    train(model, layer.input(), steps=5)
    still = {name for name, value in before.items() if torch.equal(value, named[name])}
    assert still == _without_effect(before), sorted(still)


def _without_effect(names):
    """The key bias of attention, which its softmax cancels."""
    return {name for name in names if name.endswith('attn.k_proj_bias')}


def test_frozen_weights_stay_and_removal_brings_the_base_back(plain, model, layer, config):
    parameters = {id(p) for p in model.parameters()}
    x = layer.input()
    train(model, x)
    trained = model(x)
    mmpeft.remove(model)
    assert {id(p) for p in model.parameters()} <= parameters
    assert set(model.state_dict()) == set(plain.state_dict())
    assert not hasattr(model, 'peft')
    if config['type'] == 'Full':
        assert torch.equal(model(x), trained)
        return
    for key, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    assert torch.equal(model(x), plain(x))
    assert all(p.requires_grad for p in model.parameters())


def test_save_and_load(plain, model, layer, config, tmp_path):
    randomize(model)
    x = layer.input()
    path = mmpeft.save_adapter(model, tmp_path / 'adapter.safetensors')
    state = mmpeft.adapter_state_dict(model)
    assert not any(key.endswith('original') for key in state)
    fresh = copy.deepcopy(plain)
    mmpeft.load_adapter(fresh, path)
    assert torch.equal(fresh(x), model(x))
    again = copy.deepcopy(plain)
    inject(again, config)
    mmpeft.load_adapter(again, path)
    assert torch.equal(again(x), model(x))


def test_a_copy_is_independent(model, layer):
    randomize(model)
    x = layer.input()
    copied = copy.deepcopy(model)
    before = model(x)
    assert torch.equal(copied(x), before)
    randomize(copied)
    assert torch.equal(model(x), before)
    if any(True for _ in adapter_parameters(model)):
        assert not torch.equal(copied(x), before)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(layer, config, case, dtype):
    model, x = layer.build(dtype), layer.input(dtype)
    before = model(x)
    inject(model, config)
    assert before.dtype == dtype
    if starts_as_identity(case):
        torch.testing.assert_close(model(x), before)
    assert all(p.dtype == torch.float32 for p in adapter_parameters(model))
    randomize(model, 0.1)
    attached = model(x)
    assert attached.dtype == dtype and attached.isfinite().all()
    if case in ON_WEIGHTS:
        mmpeft.merge(model)
        half = dict(rtol=0.02, atol=0.02)
        tolerance = dict(rtol=1e-5, atol=1e-6) if dtype == torch.float32 else half
        torch.testing.assert_close(model(x), attached, **tolerance)


def test_counts_on_the_meta_device(layer, config):
    real = inject(layer.build(), config)
    with torch.device('meta'):
        empty = layer.build()
    assert inject(empty, config).to_dict() == real.to_dict()
