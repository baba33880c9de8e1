"""AdaLoRA: three factors, and which of their ranks stay."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.injection.weights import weights_of
from mmpeft.methods.adalora import AdaLoRA, importance, smoothed, triplets_at
from tests.adapting import (
    close,
)
from tests.allocating import (
    adapted_network,
    loss_of,
    network,
    train,
    trainable,
)
from tests.cases import randomize

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


RANKS = dict(type='AdaLoRA', rank=2, layout='loralib', warmup=10, settle=20, beta1=0.7, beta2=0.8)


OVERRIDES = {'out': dict(rank=1, init_rank=4)}


# Triplets of the convolution (3 for each rank), the linear pair and the last layer.
INITIAL, TARGET = 3 * 3 + 3 + 4, 3 * 2 + 2 + 1


def test_adalora_multiplies_three_factors():
    model, adapters = adapted_network(dict(type='AdaLoRA', rank=2, scale=0.7))
    randomize(model)
    for name in ('conv', 'hidden', 'out'):
        layer = getattr(model, name)
        original = layer.parametrizations.weight.original.numpy()
        f = {k: v.detach().numpy() for k, v in layer.parametrizations.weight[0].factors.items()}
        delta = np.einsum('nr,r,rm->nm', f['lora_B'], f['lora_E'], f['lora_A'])
        close(layer.weight.detach().numpy(), original + 0.7 * delta.reshape(original.shape))
    assert len(adapters) == 3


@pytest.mark.parametrize('layout, sizes', [('loralib', (18, 9, 9)), ('channel', (6, 3, 27))])
def test_adaloras_parameters_are_those_of_the_initial_rank(layout, sizes):
    rows, inner, columns = sizes
    spec = dict(weights_of(nn.Conv2d(3, 6, 3)))['weight']
    f = AdaLoRA(rank=2, layout=layout).init(torch.empty(spec.shape), spec)
    assert f['lora_B'].shape == (rows, inner) and f['lora_A'].shape == (inner, columns)
    assert f['lora_E'].shape == (inner,)
    explicit = AdaLoRA(rank=2, init_rank=5, layout=layout).init(torch.empty(spec.shape), spec)
    assert sum(v.numel() for v in explicit.values()) == 5 * inner // 3 * (rows + columns + 1)


def test_adalora_starts_with_zero_lambda_and_gaussian_vectors():
    spec = dict(weights_of(nn.Linear(300, 200)))['weight']
    f = AdaLoRA(rank=30).init(torch.empty(200, 300), spec)
    assert f['lora_A'].shape == (45, 300) and not f['lora_E'].any()
    for name in ('lora_A', 'lora_B'):
        assert abs(f[name].std() / 0.02 - 1) < 0.03 and abs(f[name].mean()) < 1e-3


def test_orthogonality_against_numpy():
    model, adapters = adapted_network(RANKS | dict(orthogonality=0.3))
    randomize(model)
    expected = 0
    for adapter in adapters.values():
        p, q = adapter.lora_B.detach().numpy(), adapter.lora_A.detach().numpy()
        eye = np.eye(p.shape[1])
        term = 0.3 * (((p.T @ p - eye) ** 2).sum() + ((q @ q.T - eye) ** 2).sum())
        close(adapter.penalty().item(), term)
        expected += term
    close(mmpeft.penalty(model).item(), expected)
    assert mmpeft.penalty(adapted_network(RANKS | dict(orthogonality=0))[0]) is None


def test_the_schedule_falls_from_the_first_to_the_last_number():
    b = [triplets_at(t, 96, 64, 100, 700) for t in range(1001)]
    assert b[:101] == [96] * 101 and b[700:] == [64] * 301
    assert all(x >= y for x, y in zip(b, b[1:], strict=False)) and min(b) == 64
    assert b[400] == 64 + int(32 * 0.5**3) and b[250] == 64 + int(32 * 0.75**3)
    assert [triplets_at(t, 9, 4, 3, 3) for t in (2, 3, 4)] == [9, 4, 4]


def numpy_schedule(step):
    """b(t) of the runs below."""
    phase = np.clip((step - 10) / 30, 0, 1)
    return TARGET + int(np.floor((INITIAL - TARGET) * (1 - phase) ** 3))


class NumpyAllocator:
    """Paper Eq. 6-12 for one model, over a single list of triplets."""

    def __init__(self, adapters, every):
        self.adapters, self.every, self.final = adapters, every, None
        self.ema = {}

    def arrays(self, gradient=False):
        return {
            (path, n): (p.grad if gradient else p).detach().numpy().copy()
            for path, a in self.adapters.items()
            for n, p in a.named_parameters()
        }

    def observe(self):
        gradients = self.arrays(gradient=True)
        for key, value in self.arrays().items():
            now = np.abs(value * gradients[key])
            mean, deviation = self.ema.get(key, (np.zeros_like(now), np.zeros_like(now)))
            mean = 0.7 * mean + (1 - 0.7) * now
            self.ema[key] = mean, 0.8 * deviation + (1 - 0.8) * np.abs(now - mean)

    def lambdas(self, step):
        """All lambda after a step, from those that the optimizer left."""
        arrays = self.arrays()
        stepped = np.concatenate([arrays[path, 'lora_E'] for path in self.adapters])
        if step < 40 and (step <= 10 or step % self.every):
            return stepped
        if self.final is None:
            s = {key: mean * deviation for key, (mean, deviation) in self.ema.items()}
            scores = []
            for path in self.adapters:
                for i in range(len(s[path, 'lora_E'])):
                    column, row = s[path, 'lora_B'][:, i], s[path, 'lora_A'][i]
                    scores.append(s[path, 'lora_E'][i] + column.mean() + row.mean())
            order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
            kept = np.isin(np.arange(len(scores)), order[: numpy_schedule(step)])
            if step >= 40:
                self.final = kept
        else:
            kept = self.final
        return np.where(kept, stepped, 0)


@pytest.mark.parametrize('every', [1, 7])
@pytest.mark.parametrize('optimizer', [torch.optim.AdamW, partial(torch.optim.SGD, momentum=0.9)])
def test_adalora_against_numpy_over_a_whole_run(every, optimizer):
    model, adapters = adapted_network(RANKS | dict(every=every), overrides=OVERRIDES)
    optimizer = optimizer(trainable(model), lr=0.02)
    reference, expected, counts = NumpyAllocator(adapters, every), [], []
    optimizer.register_step_pre_hook(lambda *_: reference.observe())
    optimizer.register_step_post_hook(
        lambda *_: expected.append(reference.lambdas(len(expected) + 1))
    )
    allocation = mmpeft.allocate(model, optimizer, 60)
    (allocator,) = allocation.allocators
    assert (allocator.initial, allocator.target) == (INITIAL, TARGET)

    def check(step):
        lambdas = np.concatenate([a.lora_E.detach().numpy() for a in adapters.values()])
        np.testing.assert_array_equal(lambdas, expected[step - 1])
        counts.append(np.count_nonzero(lambdas))
        if step >= 40 or step <= 10 or step % every == 0:
            assert counts[-1] == numpy_schedule(step)
        else:
            assert counts[-1] >= numpy_schedule(step)

    train(model, optimizer, range(60), check)
    assert counts[9] == INITIAL and counts[-1] == TARGET
    assert len(set(counts)) > 3, 'the run should see several budgets'
    assert allocator.averages == {}


def test_what_was_taken_away_may_come_back_before_the_ranks_stand():
    model, adapters = adapted_network(RANKS | dict(every=3), overrides=OVERRIDES)
    optimizer = torch.optim.AdamW(trainable(model), lr=0.02)
    mmpeft.allocate(model, optimizer, 60)
    zeros = []

    def note(step):
        zeros.append(torch.cat([a.lora_E.detach() == 0 for a in adapters.values()]))

    train(model, optimizer, range(60), note)
    gone_then_back = (zeros[29] & ~zeros[30]).any()
    assert gone_then_back
    assert all(torch.equal(z, zeros[39]) for z in zeros[39:])


def test_equal_importance_is_decided_by_order():
    model, adapters = adapted_network(
        RANKS | dict(warmup=0, settle=0, every=1, rank=1, layout='channel')
    )
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    mmpeft.allocate(model, optimizer, 1)
    for p in trainable(model):
        p.grad = torch.zeros_like(p)
    with torch.no_grad():
        for adapter in adapters.values():
            adapter.lora_E.fill_(1.0)
    optimizer.step()
    kept = torch.cat([a.lora_E.detach() for a in adapters.values()])
    assert kept.tolist() == [1, 1, 1, 0, 0, 0]


def test_a_step_without_gradients_leaves_the_averages():
    model, adapters = adapted_network(RANKS)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    (allocator,) = mmpeft.allocate(model, optimizer, 60).allocators
    train(model, optimizer, range(12))
    before = copy.deepcopy(allocator.averages)
    path = next(iter(adapters))
    loss_of(model, 12).backward()
    adapters[path].lora_E.grad = None
    optimizer.step()
    moved = {
        (p, n): not torch.equal(value, before[p][n])
        for p, values in allocator.averages.items()
        for n, value in values.items()
    }
    assert [key for key, m in moved.items() if not m] == [(path, 'lora_E')]
    optimizer.zero_grad()
    optimizer.step()
    assert allocator.step == 14


def test_scores_against_numpy():
    rng = np.random.default_rng(3)
    mean, deviation, now = rng.random((3, 4, 5))
    new, spread = smoothed(*map(torch.tensor, (mean, deviation, now)), 0.85, 0.6)
    close(new, 0.85 * mean + 0.15 * now)
    close(spread, 0.6 * deviation + 0.4 * np.abs(now - new.numpy()))
    p, e, q = rng.random((7, 3)), rng.random(3), rng.random((3, 5))
    close(importance(*map(torch.tensor, (p, e, q))), e + p.sum(0) / 7 + q.sum(1) / 5)


def test_a_budget_counts_what_is_there_at_the_start():
    sizes = {}
    for init_rank, rank in ((None, 4), (8, 4)):
        model = network()
        config = dict(type='AdaLoRA', rank=rank, init_rank=init_rank, layout='channel')
        summary = mmpeft.inject(model, config | dict(budget=400))
        method = model.peft[0].method
        inner, sites = method.first_rank, (6 + 27, 6 + 6, 4 + 6)
        assert summary.adapters == sum(inner * (size + 1) for size in sites) <= 400
        sizes[init_rank] = method.rank, inner
    assert sizes == {None: (4, 6), 8: (3, 6)}
