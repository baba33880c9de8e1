"""What methods with an update dW share: how it is applied, dropout, scales."""

import numpy as np
import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.injection.site import named_adapters
from mmpeft.methods.channels import draw_input_dropout, per_input
from mmpeft.methods.liera import LieRA
from tests.adapting import adapted, close, spec_of
from tests.cases import LAYERS, randomize

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


@pytest.mark.parametrize('update, function', [('lie', lambda d: 1 + d), ('lie_exact', np.exp)])
def test_liera_multiplies(update, function):
    layer = nn.Conv2d(4, 6, 3)
    frozen, new, f = adapted(layer, dict(type='LieRA', rank=2, scale=2.0, update=update))
    delta = 2 * (f['lora_B'] @ f['lora_A']).reshape(frozen.shape)
    close(new, frozen * function(delta))


def test_liera_is_lora_with_the_first_order_update():
    torch.manual_seed(1)
    one = adapted(nn.Linear(4, 4), dict(type='LieRA', rank=2))
    torch.manual_seed(1)
    two = adapted(nn.Linear(4, 4), dict(type='LoRA', rank=2, update='lie'))
    close(one[1], two[1])


def test_lie_updates_keep_zeros_and_signs():
    layer = nn.Linear(5, 5)
    nn.init.zeros_(layer.weight[0])
    frozen, new, _ = adapted(layer, dict(type='LieRA', rank=5, update='lie_exact'))
    assert not new[0].any()
    assert (np.sign(new) == np.sign(frozen)).all()


@pytest.mark.parametrize('name', ['linear', 'conv2d_circular', 'depthwise', 'transposed2d'])
def test_dropout_drops_input_channels(name):
    """phi with dropout on an input is phi without it on an input with channels dropped."""
    case = LAYERS[name]
    layer, x = case.make().double(), case.input()
    spec = spec_of(layer)
    mask = per_input(draw_input_dropout(layer.weight, spec, 0.5), spec)
    assert set(mask.unique().tolist()) <= {0.0, 2.0}
    position = x.ndim - 1 if name == 'linear' else 1
    per_channel = torch.zeros(spec.in_features, dtype=torch.float64)
    full = mask.expand(spec.shape)
    for channel in range(spec.in_features):
        group, within = divmod(channel, spec.in_features // spec.groups)
        rows = spec.shape[0] // spec.groups
        picked = full[channel] if spec.input_first else full[group * rows, within]
        per_channel[channel] = picked.flatten()[0]
    shape = [1] * x.ndim
    shape[position] = -1
    nn.init.zeros_(layer.bias)
    expected = layer(x * per_channel.view(shape))
    with torch.no_grad():
        layer.weight.mul_(mask)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_dropout_acts_in_training_alone_and_keeps_the_mean():
    layer = nn.Linear(4, 3).double()
    mmpeft.inject(layer, dict(type='LoRA', rank=2, dropout=0.4))
    randomize(layer)
    layer.eval()
    expected = layer.weight.detach()
    assert torch.equal(layer.weight, expected)
    layer.train()
    draws = torch.stack([layer.weight.detach() for _ in range(4000)])
    assert draws.std(0).max() > 0.05
    torch.testing.assert_close(draws.mean(0), expected, rtol=0.1, atol=0.02)


# The default scale of Lie updates

LIE = [
    (dict(type='LieRA', rank=2), 1.0, 1),
    (dict(type='LieRA', rank=2, update='lie_exact'), 1.0, 1),
    (dict(type='LoRA', rank=2, update='lie'), 1.0, 1),
    (dict(type='DoRA', rank=2, update='lie'), 1.0, 1),
    (dict(type='FLoRA', rank=2, update='lie'), 4.0, 1),
    (dict(type='LoTR', rank=2, update='lie'), 1.0, 1),
    (dict(type='LoHa', rank=2, update='lie'), 1.0, 1),
    (dict(type='VeRA', rank=4, update='lie_exact'), 1.0, 1),
    (dict(type='AdaLoRA', rank=2, update='lie'), 1.0, 1),
    (dict(type='SVDiff', update='lie'), 1.0, 1),
    (dict(type='PiSSA', rank=2, update='lie'), 1.0, 2),
    (dict(type='MiLoRA', rank=2, update='lie'), 1.0, 2),
]


def small_network(size=0.03):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 5)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(size / 0.1)
    return model


def numpy_scale(model, additive, power):
    """The rule: divided by the root mean square of all weights, to two significant digits."""
    weights = [m.weight.detach().numpy().ravel() for m in model if hasattr(m, 'weight')]
    size = np.sqrt(np.mean(np.concatenate(weights) ** 2))
    exact = additive / size**power
    digits = 10 ** (np.floor(np.log10(exact)) - 1)
    return np.round(exact / digits) * digits


@pytest.mark.parametrize('config, additive, power', LIE, ids=lambda value: str(value)[:50])
def test_the_scale_of_a_lie_update_follows_the_weights(config, additive, power):
    model = small_network()
    expected = numpy_scale(model, additive, power)
    assert 10 < expected < 10_000
    mmpeft.inject(model, config)
    (record,), adapters = model.peft, named_adapters(model).values()
    assert {a.method for a in adapters} == {record.method} and len(adapters) == 2
    np.testing.assert_allclose(record.method.scale, expected, rtol=1e-12)
    assert record.method.scaling == record.method.scale
    assert f'scale={record.method.scale!r}' in str(record.method)
    assert record.method.config()['scale'] == record.method.scale


@pytest.mark.parametrize(
    'config, scaling',
    [
        (dict(type='LoRA', rank=2), 1.0),
        (dict(type='FLoRA', rank=2), 4.0),
        (dict(type='LoRA', rank=2, update='lie', scale=3), 3),
        (dict(type='LoRA', rank=2, update='lie', alpha=8), 4.0),
        (dict(type='FLoRA', rank=2, update='lie', scale=0.4), 0.4),
    ],
    ids=str,
)
def test_additive_updates_and_given_scales_stay(config, scaling):
    model = small_network()
    mmpeft.inject(model, config)
    method = mmpeft.METHODS.build(config)
    assert model.peft[0].method == method and method.scaling == scaling


@pytest.mark.parametrize('config', [case[0] for case in LIE[:5]], ids=str)
def test_resolving_is_idempotent_and_open_without_values(config):
    method, layer = mmpeft.METHODS.build(config), small_network()[0]
    pairs = [(w.detach(), spec_of(layer)) for w in layer.weight]
    weight, spec = pairs[0]
    resolved = method.resolve(iter(pairs))
    assert resolved != method and resolved.resolve([(3 * weight, spec)]) is resolved
    assert method.resolve([*pairs, (weight.to('meta'), spec)]) is method
    assert method.resolve([]) is method and method.resolve([(0 * weight, spec)]) is method
    assert method.resolve([(weight / 0, spec)]) is method
    half = method.resolve([(w.to(torch.bfloat16).to(torch.float32), spec) for w, _ in pairs])
    assert abs(half.scale / resolved.scale - 1) < 0.11


def test_sites_with_other_arguments_have_the_same_scale():
    model = small_network()
    expected = numpy_scale(model, 1.0, 1)
    overrides = {'^0': dict(rank=1, update='additive'), '^2': dict(rank=3)}
    model.append(nn.Linear(5, 5).double())
    model[3].weight.data.zero_()
    mmpeft.inject(model, dict(type='LieRA', rank=2), dict(include=['0', '2'], overrides=overrides))
    first, second = (a.method for a in named_adapters(model).values())
    assert (first.scale, first.scaling) == (None, 1.0) and second.rank == 3
    np.testing.assert_allclose([second.scale, model.peft[0].method.scale], expected, rtol=1e-12)


def test_tied_weights_count_once_and_a_budget_keeps_the_scale():
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 40)).double()
    model[1].weight = model[0].weight
    with torch.no_grad():
        model[0].weight.fill_(0.02)
        model[2].weight.fill_(0.01)
    mmpeft.inject(model, dict(type='LieRA', budget=500))
    assert model.peft[0].method == LieRA(rank=3, scale=63.0)  # 1 / sqrt((2^2 + 1^2) / 2) * 100


def step_of(method, optimizer, seed=0):
    """How far one step moves the weights: root mean square of the difference."""
    torch.manual_seed(seed)
    model = small_network()
    mmpeft.inject(model, method)
    with torch.no_grad():  # at the start some methods move in their second step alone
        for adapter in named_adapters(model).values():
            for name in ('lora_B', 'core', 'loha_B2'):
                if hasattr(adapter, name):
                    getattr(adapter, name).normal_(std=1e-3)
    layers = model[0], model[2]
    before = [layer.weight.detach().clone() for layer in layers]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer(trained)
    x, y = torch.randn(16, 3, 6, 6).double(), torch.randint(5, (16,))
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    moved = [(layer.weight - old).flatten() for layer, old in zip(layers, before, strict=True)]
    return torch.cat(moved).square().mean().sqrt().item()


OPTIMIZERS = dict(
    sgd=lambda parameters: torch.optim.SGD(parameters, 1e-3),
    adam=lambda parameters: torch.optim.Adam(parameters, 1e-4),
)


@pytest.mark.parametrize('optimizer', OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize('method', ['LoRA', 'FLoRA', 'LoHa', 'PiSSA', 'MiLoRA'])
def test_a_step_moves_weights_about_as_far_as_the_additive_update_does(method, optimizer):
    ratios = []
    for seed in range(5):
        additive, lie, unscaled = (
            step_of(dict(type=method, rank=4, update=update) | scale, optimizer, seed)
            for update, scale in (('additive', {}), ('lie', {}), ('lie', dict(scale=1.0)))
        )
        ratios.append(lie / additive)
        assert unscaled < 0.25 * additive
    assert 0.4 < np.median(ratios) < 2.5, ratios
