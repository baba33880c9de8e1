"""Diff pruning: gated differences, and their projection."""

import numpy as np
import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.injection.weights import weights_of
from mmpeft.methods.diff_pruning import DiffPruning, hard_concrete, open_probability
from tests.adapting import close
from tests.allocating import adapted_network, loss_of, train, trainable
from tests.cases import randomize

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


def numpy_gate(log_alpha, u, low, high):
    s = 1 / (1 + np.exp(-(log_alpha + np.log(u) - np.log(1 - u))))
    return np.minimum(1, np.maximum(0, s * (high - low) + low))


@pytest.mark.parametrize('low, high', [(-1.5, 1.5), (-0.1, 1.1)])
def test_gates_against_numpy(low, high):
    rng = np.random.default_rng(0)
    log_alpha, u = 3 * rng.standard_normal(5000), rng.uniform(0.001, 0.999, 5000)
    ours = hard_concrete(torch.tensor(log_alpha), torch.tensor(u), low, high).numpy()
    close(ours, numpy_gate(log_alpha, u, low, high))
    assert (ours == 0).any() and (ours == 1).any() and ((ours > 0) & (ours < 1)).any()
    close(
        hard_concrete(torch.tensor(log_alpha), None, low, high),
        numpy_gate(log_alpha, 0.5, low, high),
    )


@pytest.mark.parametrize('low, high', [(-1.5, 1.5), (-0.1, 1.1)])
def test_the_probability_of_an_open_gate(low, high):
    log_alpha = torch.linspace(-4, 4, 9, dtype=torch.float64)
    closed_form = open_probability(log_alpha, low, high)
    close(closed_form, 1 / (1 + np.exp(np.log(-low / high) - log_alpha.numpy())))
    draws = 40000
    noise = torch.rand(draws, 9, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    opened = (hard_concrete(log_alpha.expand(draws, 9), noise, low, high) > 0).double().mean(0)
    sigma = (closed_form * (1 - closed_form) / draws).sqrt()
    assert ((opened - closed_form).abs() < 4 * sigma + 1e-9).all()


@pytest.mark.parametrize('structured', [False, True])
def test_the_l0_term_is_the_expected_number_of_open_gates(structured):
    config = dict(type='DiffPruning', l0_weight=0.01, start=0.5, gate_speed=2.0)
    model, adapters = adapted_network(config | dict(structured=structured))
    randomize(model)
    expected = 0
    for adapter in adapters.values():
        f = {k: v.detach().numpy() for k, v in adapter.factors.items()}
        opened = 1 / (1 + np.exp(-(0.5 + 2 * f['gate'])))
        if structured:
            opened = opened / (1 + np.exp(-(0.5 + 2 * f['weight_gate'])))
        close(adapter.penalty().item(), 0.01 * opened.sum())
        expected += 0.01 * opened.sum()
        torch.manual_seed(4)
        draws = [(adapter.method.gates(adapter.factors, True) > 0).sum() for _ in range(400)]
        spread = torch.stack(draws).double()
        assert abs(spread.mean() - opened.sum()) < 5 * spread.std() / 20
    close(mmpeft.penalty(model).item(), expected)
    assert mmpeft.penalty(adapted_network(config | dict(l0_weight=0))[0]) is None


@pytest.mark.parametrize('structured', [False, True])
def test_diff_pruning_against_numpy(structured):
    config = dict(type='DiffPruning', start=0.5, gate_speed=2.0, structured=structured)
    model, adapters = adapted_network(config)
    randomize(model)
    weight, adapter = (
        model.conv.parametrizations.weight.original,
        adapters['conv.parametrizations.weight.0'],
    )
    f = {k: v.detach().numpy() for k, v in adapter.factors.items()}
    sizes = {k: v.shape for k, v in f.items()}
    assert sizes.pop('weight_gate', None) == ((1,) if structured else None)
    assert sizes == dict(delta=(6, 3, 3, 3), gate=(6, 3, 3, 3))
    z = numpy_gate(0.5 + 2 * f['gate'], 0.5, -1.5, 1.5)
    if structured:
        z = z * numpy_gate(0.5 + 2 * f['weight_gate'], 0.5, -1.5, 1.5)
    close(model.eval().conv.weight.detach(), weight.numpy() + z * f['delta'])
    model.train()
    torch.manual_seed(9)
    drawn = model.conv.weight.detach()
    torch.manual_seed(9)
    noise = torch.rand(6, 3, 3, 3, dtype=torch.float64)
    z = numpy_gate(0.5 + 2 * f['gate'], noise.numpy(), -1.5, 1.5)
    if structured:
        noise = torch.rand(1, dtype=torch.float64).numpy()
        z = z * numpy_gate(0.5 + 2 * f['weight_gate'], noise, -1.5, 1.5)
    close(drawn, weight.numpy() + z * f['delta'])


def test_gates_are_drawn_in_training_alone():
    model, _ = adapted_network(dict(type='DiffPruning', start=0.5))
    randomize(model)
    assert not torch.equal(model.conv.weight, model.conv.weight)
    model.eval()
    assert torch.equal(model.conv.weight, model.conv.weight)
    quiet, _ = adapted_network(dict(type='DiffPruning', start=0.5, sample=False))
    randomize(quiet)
    assert torch.equal(quiet.conv.weight, quiet.conv.weight)


def test_an_open_start():
    spec = dict(weights_of(nn.Linear(200, 100)))['weight']
    method = DiffPruning()
    factors = method.init(torch.empty(100, 200), spec)
    assert not any(f.any() for f in factors.values())
    assert (method.gates(factors) == 1).all()
    torch.manual_seed(0)
    share = (method.gates(factors, sample=True) == 1).double().mean()
    assert abs(share - 1 / (1 + np.exp(np.log(5) - 5))) < 0.005


def test_an_adam_step_moves_gates_by_the_learning_rate_times_their_speed():
    model, adapters = adapted_network(
        dict(type='DiffPruning', start=0.5, gate_speed=1000.0, sample=False)
    )
    randomize(model, 1e-4)
    before = [a.method.log_alpha(a.gate).detach() for a in adapters.values()]
    loss_of(model, 0).backward()
    torch.optim.Adam(trainable(model), lr=1e-4, eps=0).step()
    for adapter, old in zip(adapters.values(), before, strict=True):
        moved = (adapter.method.log_alpha(adapter.gate) - old).abs()
        torch.testing.assert_close(moved.max().item(), 0.1, rtol=1e-6, atol=0)


@pytest.mark.parametrize('structured', [False, True])
def test_projection_keeps_exactly_the_share(structured):
    config = dict(
        type='DiffPruning', density=0.1, project_at=0.5, structured=structured, gate_speed=5.0
    )
    model, adapters = adapted_network(
        config | dict(start=1.0), overrides={'out': dict(density=0.5)}
    )
    optimizer = torch.optim.AdamW(trainable(model), lr=0.02)
    before = {}

    def note(*_):
        """The differences that evaluation sees, after the step and ahead of the projection."""
        before.clear()
        for path, adapter in adapters.items():
            z = adapter.method.gates(adapter.factors).detach().numpy()
            before[path] = z * adapter.delta.detach().numpy()

    optimizer.register_step_post_hook(note)
    mmpeft.allocate(model, optimizer, 30)
    train(model, optimizer, range(15))
    count = round(0.1 * (162 + 36) + 0.5 * 24)
    everything = np.concatenate([value.ravel() for value in before.values()])
    chosen = np.sort(np.argsort(-np.abs(everything), kind='stable')[:count])
    expected = np.zeros_like(everything)
    expected[chosen] = everything[chosen]

    def difference():
        gates = [a.method.gates(a.factors, sample=True).flatten() for a in adapters.values()]
        deltas = [a.delta.flatten() for a in adapters.values()]
        return torch.cat(gates).detach(), torch.cat(deltas).detach()

    z, delta = difference()
    np.testing.assert_array_equal((z * delta).numpy(), expected)
    assert count == 32 == np.count_nonzero(expected) < np.count_nonzero(everything)
    assert z.sum() == count and set(z.tolist()) == {0.0, 1.0}
    settled = [p.detach().clone() for n, p in model.named_parameters() if n.endswith('gate')]
    train(model, optimizer, range(15, 30))
    now = [p.detach() for n, p in model.named_parameters() if n.endswith('gate')]
    assert all(map(torch.equal, settled, now))
    z_after, delta_after = difference()
    assert torch.equal(z, z_after)
    assert ((delta_after != delta) & (z == 1)).sum() > 0.9 * count

    x = torch.randn(4, 3, 6, 6).double()
    attached = model(x)
    assert torch.equal(model.eval()(x), attached)
    changed = 0
    for layer in (model.conv, model.hidden, model.out):
        changed += (layer.weight != layer.parametrizations.weight.original).sum().item()
    assert changed == count
    mmpeft.merge(model)
    torch.testing.assert_close(model(x), attached, rtol=1e-12, atol=1e-12)


def test_projection_opens_no_gate_that_training_closed():
    model, adapters = adapted_network(
        dict(
            type='DiffPruning', density=0.5, project_at=1, start=-3.0, gate_speed=1.0, sample=False
        )
    )
    randomize(model, 1e-3)
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    mmpeft.allocate(model, optimizer, 2)
    with torch.no_grad():
        model.out.parametrizations.weight[0].gate[0, :3] += 5
    train(model, optimizer, [0])
    opened = [(a.method.gates(a.factors) > 0).sum().item() for a in adapters.values()]
    assert opened == [0, 0, 3]
