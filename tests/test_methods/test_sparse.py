"""FISH and PaFi: a few entries of each weight."""

import numpy as np
import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.methods.fish import FISH
from tests.adapting import adapted, close
from tests.allocating import adapted_network, loss_of, network, train, trainable
from tests.cases import randomize

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


def dense_squares(steps, micro=1):
    """Sums of squared gradients of a network's weights, by autograd on the plain network."""
    model = network()
    weights = [model.conv.weight, model.hidden.weight, model.out.weight]
    squares = [np.zeros(w.shape) for w in weights]
    for step in steps:
        losses = sum(loss_of(model, step, m) for m in range(micro))
        for square, gradient in zip(squares, torch.autograd.grad(losses, weights), strict=True):
            square += gradient.numpy() ** 2
    return squares


def top(square, k):
    return np.sort(np.argsort(-square.ravel(), kind='stable')[:k])


def test_fish_adds_values_at_its_entries():
    model, adapters = adapted_network(dict(type='FISH', density=0.1))
    randomize(model)
    expected = {'conv': 16, 'hidden': 4, 'out': 2}
    for name, k in expected.items():
        layer = getattr(model, name)
        original, adapter = (
            layer.parametrizations.weight.original,
            adapters[f'{name}.parametrizations.weight.0'],
        )
        new = original.numpy().copy().ravel()
        for place, value in zip(adapter.index.tolist(), adapter.values.tolist(), strict=True):
            new[place] += value
        close(layer.weight.detach().numpy().ravel(), new)
        assert adapter.values.numel() == adapter.index.numel() == k
        np.testing.assert_array_equal(adapter.index, top(np.abs(original.numpy()), k))
    assert FISH(density=0.001).count(adapter.spec) == 1


@pytest.mark.parametrize('micro', [1, 2])
def test_fish_picks_the_largest_squared_gradients(micro):
    model, adapters = adapted_network(dict(type='FISH', density=0.1, samples=5))
    start = [a.index.clone() for a in adapters.values()]
    frozen = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(trainable(model), lr=0.05)
    allocation = mmpeft.allocate(model, optimizer, 40)
    (allocator,) = allocation.allocators

    def steps(numbers):
        for step in numbers:
            optimizer.zero_grad()
            for m in range(micro):
                loss_of(model, step, m).backward()
            optimizer.step()

    steps(range(4))
    assert all(torch.equal(a.index, i) for a, i in zip(adapters.values(), start, strict=True))
    for score, square in zip(
        allocator.scores.values(), dense_squares(range(4), micro), strict=True
    ):
        np.testing.assert_allclose(score, square, rtol=1e-9, atol=1e-18)
    steps([4])
    for adapter, square in zip(adapters.values(), dense_squares(range(5), micro), strict=True):
        np.testing.assert_array_equal(adapter.index, top(square, adapter.values.numel()))
        assert not adapter.values.any()
        assert not adapter._forward_hooks
    assert any(not torch.equal(a.index, i) for a, i in zip(adapters.values(), start, strict=True))
    assert not allocator.scores
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters())

    chosen = [a.index.clone() for a in adapters.values()]
    steps(range(5, 15))
    assert all(torch.equal(a.index, i) for a, i in zip(adapters.values(), chosen, strict=True))
    for adapter, name in zip(adapters.values(), ('conv', 'hidden', 'out'), strict=True):
        layer = getattr(model, name)
        changed = (layer.weight != layer.parametrizations.weight.original).flatten()
        assert torch.equal(changed.nonzero().flatten(), adapter.index)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, frozen[n])}
    assert moved == {n for n in frozen if n.endswith('.values')}


def test_fish_takes_at_most_half_of_a_run():
    for steps, samples in ((40, 16), (10, 5), (1, 0)):
        model, _ = adapted_network(dict(type='FISH'))
        optimizer = torch.optim.SGD(trainable(model), lr=0.1)
        (allocator,) = mmpeft.allocate(model, optimizer, steps).allocators
        assert allocator.samples == samples and bool(allocator.scores) is (samples > 0)


def test_a_step_that_overflowed_counts_for_nothing():
    model, adapters = adapted_network(dict(type='FISH', density=0.1, samples=5))
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    (allocator,) = mmpeft.allocate(model, optimizer, 40).allocators
    train(model, optimizer, [0])
    (loss_of(model, 1) * float('inf')).backward()
    optimizer.step()
    train(model, optimizer, [2])
    for score, square in zip(allocator.scores.values(), dense_squares([0, 2]), strict=True):
        np.testing.assert_allclose(score, square, rtol=1e-9, atol=1e-18)


def test_a_trained_fish_mask_is_kept_in_a_second_run():
    model, adapters = adapted_network(dict(type='FISH', density=0.1, samples=2))
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    first = mmpeft.allocate(model, optimizer, 40)
    train(model, optimizer, range(6))
    first.close()
    index = [a.index.clone() for a in adapters.values()]
    values = [a.values.detach().clone() for a in adapters.values()]
    mmpeft.allocate(model, optimizer, 40)
    train(model, optimizer, range(50, 55))
    assert all(torch.equal(a.index, i) for a, i in zip(adapters.values(), index, strict=True))
    assert all(not torch.equal(a.values, v) for a, v in zip(adapters.values(), values, strict=True))


def test_a_weight_without_gradients_keeps_its_largest_entries():
    model, adapters = adapted_network(dict(type='FISH', density=0.1, samples=2))
    start = {path: a.index.clone() for path, a in adapters.items()}
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    mmpeft.allocate(model, optimizer, 40)
    for _ in range(3):
        model.out(torch.randn(5, 6).double()).square().sum().backward()
        optimizer.step()
    same = {path: torch.equal(a.index, start[path]) for path, a in adapters.items()}
    assert [path for path, equal in same.items() if not equal] == ['out.parametrizations.weight.0']


def test_pafi_trains_the_smallest_entries():
    layer = nn.Conv2d(4, 6, 3)
    frozen, new, f = adapted(layer, dict(type='PaFi', density=0.1))
    smallest = np.sort(np.argsort(np.abs(frozen).ravel(), kind='stable')[:22])
    assert (f['index'] == smallest).all() and f['values'].shape == (22,)
    expected = frozen.copy().ravel()
    expected[smallest] += f['values']
    close(new, expected.reshape(frozen.shape))
