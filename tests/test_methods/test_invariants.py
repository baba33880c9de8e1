"""What holds for every method on every kind of layer or network, in float64.

Identity, gradients and merging are tested for every method on every layer. The
other invariants are tested for every method on every group of layers; which
layer of a group, and which variant of a method, changes from one to the next.
"""

import contextlib
import copy
import math
from dataclasses import replace
from functools import cached_property

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.func import functional_call

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.injection.site import adapter_parameters
from mmpeft.methods import ActivationMethod, Adapter, Method
from tests.cases import BLOCKS, KINDS, LAYERS, METHODS, NO_IDENTITY, NO_PLACE, randomize

mmpeft.METHODS.import_from_location()
ACTING = {n for n, m in mmpeft.METHODS.module_dict.items() if issubclass(m, ActivationMethod)}
WITHOUT_ADAPTERS = {'Frozen', 'Full'}
GROUPS = dict(
    matrices=('linear', 'conv2d_1x1'),
    kernels=('conv2d', 'conv1d', 'conv2d_wide', 'conv2d_circular', 'conv2d_reflect', 'conv3d'),
    depthwise=('depthwise', 'depthwise_multiplied'),
    transposed=('transposed2d', 'transposed1d', 'transposed2d_plain', 'transposed3d'),
    embedding=('embedding',),
    attention=('attention', 'attention_kdim'),
)
ON_WEIGHTS = [
    (layer, name)
    for layer in LAYERS
    for name, config in METHODS.items()
    if config['type'] not in ACTING and (config['type'], layer) not in NO_PLACE
]
ON_ACTIVATIONS = [
    (block, name)
    for block in BLOCKS
    for name, config in METHODS.items()
    if config['type'] in ACTING and (config['type'], block) not in NO_PLACE
]
EVERYWHERE = ON_WEIGHTS + ON_ACTIVATIONS


def rotated():
    """Every method on every group of layers, each variant and each layer in turn."""
    variants = {}
    for name, config in METHODS.items():
        variants.setdefault(config['type'], []).append(name)
    for number, (method, names) in enumerate(variants.items()):
        places = BLOCKS if method in ACTING else GROUPS
        for turn, place in enumerate(places):
            layers = GROUPS.get(place, (place,))
            case = layers[(number + turn) % len(layers)], names[turn % len(names)]
            if not {(method, place), (method, case[0])} & NO_PLACE:
                yield case


PAIRS = list(rotated())


class Case:
    """A layer or a network, plain and adapted by a method."""

    def __init__(self, place, name, folder):
        self.place, self.name, self.folder = place, name, folder
        self.layer, self.config = (LAYERS | BLOCKS)[place], METHODS[name]
        self.method = self.config['type']

    @cached_property
    def plain(self):
        return self.layer.build()

    @cached_property
    def model(self):
        adapted = copy.deepcopy(self.plain)
        inject(adapted, self.config)
        return adapted


def method_of(case):
    return METHODS[case[1]]['type']


def has_adapters(case):
    return method_of(case) not in WITHOUT_ADAPTERS


def starts_as_identity(case):
    return (method_of(case), case[0]) not in NO_IDENTITY


def over(cases, condition=lambda case: True):
    """Let a test run over those pairs that meet a condition: a test a method, a subtest a layer."""
    places = {}
    for place, name in filter(condition, cases):
        places.setdefault(name, []).append(place)

    def of_every_method(check):
        @pytest.mark.parametrize('name', places)
        def test(name, subtests, tmp_path):
            for place in places[name]:
                with subtests.test(place):
                    torch.default_generator.manual_seed(0)
                    check(Case(place, name, tmp_path))

        return test

    return of_every_method


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


def test_every_layer_and_every_method_is_in_a_pair():
    assert sorted(layer for group in GROUPS.values() for layer in group) == sorted(LAYERS)
    assert {layer for layer, _ in PAIRS} == {*LAYERS, *BLOCKS}
    assert {name for _, name in PAIRS} == set(METHODS)


@pytest.mark.parametrize('name', ['vera', 'randlora', 'miss'])
def test_a_model_without_values_leaves_nothing_behind(name):
    """As the memory table makes it, with weights of one shape as a later model has."""
    for mode in FakeTensorMode(allow_non_fake_inputs=True), contextlib.nullcontext():
        with mode:
            model = nn.Linear(17, 13)
            mmpeft.inject(model, METHODS[name])
    assert not any(isinstance(b, FakeTensor) for b in model.buffers())
    assert math.isfinite(float(model(torch.ones(2, 17)).sum()))


# Of every method on every layer


@over(EVERYWHERE, starts_as_identity)
@torch.no_grad()
def test_identity_at_start_to_the_last_bit(case):
    plain, model, x = case.plain, case.model, case.layer.input()
    # Attention picks its kernel by whether its weights require a gradient.
    plain.requires_grad_(case.method == 'Full')
    assert torch.equal(model(x), plain(x))
    assert torch.equal(model.eval()(x), plain.eval()(x))


@over(EVERYWHERE, has_adapters)
def test_factors_are_contiguous_for_fully_shard(case):
    assert all(p.is_contiguous() for p in adapter_parameters(case.model))


@over(EVERYWHERE, has_adapters)
def test_gradients_against_finite_differences(case):
    model, x = case.model, case.layer.input()
    randomize(model)
    adapters = {id(p) for p in adapter_parameters(model)}
    names = [n for n, p in model.named_parameters() if id(p) in adapters]
    values = [dict(model.named_parameters())[n].detach().requires_grad_() for n in names]

    def output(*parameters):
        return functional_call(model, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(output, values, fast_mode=True)


@over(ON_WEIGHTS)
def test_merged_equals_attached(case):
    plain, model, x = case.plain, case.model, case.layer.input()
    randomize(model)
    attached = model(x)
    mmpeft.merge(model)
    assert set(model.state_dict()) == set(plain.state_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    torch.testing.assert_close(model(x), attached, rtol=1e-10, atol=1e-10)


# Of every method on every group of layers


@over(ON_ACTIVATIONS)
def test_merging_is_refused_and_leaves_the_model_as_it_was(case):
    model, x = case.model, case.layer.input()
    randomize(model)
    modes = [m.training for m in model.modules()]
    state, attached = copy.deepcopy(model.state_dict()), model(x)
    with pytest.raises(UsageError, match='cannot be merged'):
        mmpeft.merge(model)
    assert [m.training for m in model.modules()] == modes
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(x), attached)


@over(PAIRS)
def test_adapters_alone_receive_gradients(case):
    model = case.model
    adapters = [m for m in model.modules() if isinstance(m, Adapter)]
    assert bool(adapters) is mmpeft.METHODS.build(case.config).adapts
    assert all(list(adapter.parameters()) for adapter in adapters)
    loss = model(case.layer.input()).square().mean()
    if loss.requires_grad:
        loss.backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    own = {id(p) for p in adapter_parameters(model)}
    trained = {n for n, p in model.named_parameters() if case.method == 'Full' or id(p) in own}
    assert with_gradient == trained


@over(PAIRS, has_adapters)
def test_every_adapter_parameter_moves_in_training(case):
    named = dict(case.model.named_parameters(remove_duplicate=False))
    before = {name: p.detach().clone() for name, p in named.items() if p.requires_grad}
    train(case.model, case.layer.input(), steps=5)
    still = {name for name, value in before.items() if torch.equal(value, named[name])}
    # The softmax of attention cancels the bias of its keys.
    assert still == {name for name in before if name.endswith('attn.k_proj_bias')}


@over(PAIRS, lambda case: method_of(case) != 'Full')
def test_frozen_weights_stay_and_removal_brings_the_base_back(case):
    plain, model, x = case.plain, case.model, case.layer.input()
    parameters = {id(p) for p in model.parameters()}
    train(model, x)
    mmpeft.remove(model)
    assert {id(p) for p in model.parameters()} <= parameters
    assert set(model.state_dict()) == set(plain.state_dict())
    assert not hasattr(model, 'peft')
    for key, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    assert torch.equal(model(x), plain(x))
    assert all(p.requires_grad for p in model.parameters())


@over(PAIRS, lambda case: method_of(case) == 'Full')
def test_removal_keeps_what_full_finetuning_trained(case):
    plain, model, x = case.plain, case.model, case.layer.input()
    train(model, x)
    trained = model(x)
    mmpeft.remove(model)
    assert set(model.state_dict()) == set(plain.state_dict()) and not hasattr(model, 'peft')
    assert torch.equal(model(x), trained) and not torch.equal(trained, plain(x))


@over(PAIRS)
def test_save_and_load(case):
    model, x = case.model, case.layer.input()
    randomize(model)
    path = mmpeft.save_adapter(model, case.folder / f'{case.place}.safetensors')
    state = mmpeft.adapter_state_dict(model)
    assert not any(key.endswith('original') for key in state)
    fresh = copy.deepcopy(case.plain)
    mmpeft.load_adapter(fresh, path)
    assert torch.equal(fresh(x), model(x))
    again = copy.deepcopy(case.plain)
    inject(again, case.config)
    mmpeft.load_adapter(again, path)
    assert torch.equal(again(x), model(x))


@over(PAIRS, has_adapters)
def test_a_copy_is_independent(case):
    model, x = case.model, case.layer.input()
    randomize(model)
    copied = copy.deepcopy(model)
    before = model(x)
    assert torch.equal(copied(x), before)
    with torch.no_grad():
        for parameter in adapter_parameters(copied):
            parameter.add_(1)  # not a draw, which may leave gates closed
    assert torch.equal(model(x), before)
    assert not torch.equal(copied(x), before)


def in_turn(pairs):
    """A dtype for each pair, in turn, so that each method and each group of layers has each."""
    dtypes = torch.float32, torch.bfloat16, torch.float16
    return {pair: dtypes[(n + n // len(GROUPS)) % 3] for n, pair in enumerate(pairs)}


DTYPES = in_turn([pair for pair in PAIRS if pair in ON_WEIGHTS])


@over(DTYPES)
def test_dtypes_on_weights(case):
    dtype = DTYPES[case.place, case.name]
    x, attached, model = computed_in(dtype, case)
    mmpeft.merge(model)
    half = dict(rtol=0.02, atol=0.02)
    tolerance = dict(rtol=1e-5, atol=1e-6) if dtype == torch.float32 else half
    torch.testing.assert_close(model(x), attached, **tolerance)


@over(ON_ACTIVATIONS)
def test_dtypes_on_activations(case):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        computed_in(dtype, case)


def computed_in(dtype, case):
    """Input, output and model in a dtype; adapters have float32."""
    model, x = case.layer.build(dtype), case.layer.input(dtype)
    before = model(x)
    assert before.dtype == dtype
    inject(model, case.config)
    if starts_as_identity((case.place, case.name)):
        torch.testing.assert_close(model(x), before)
    assert all(p.dtype == torch.float32 for p in adapter_parameters(model))
    randomize(model, 0.1)
    attached = model(x)
    assert attached.dtype == dtype and attached.isfinite().all()
    return x, attached, model


@over(PAIRS)
def test_counts_on_the_meta_device(case):
    real = inject(case.layer.build(), case.config)
    with torch.device('meta'):
        empty = case.layer.build()
    counted = inject(empty, case.config)
    for summary in (real, counted):  # scales that follow the weights are open there
        summary.rows = [replace(row, method='') for row in summary.rows]
    assert counted.to_dict() == real.to_dict()
