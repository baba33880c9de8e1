"""Methods that decide during training: AdaLoRA, diff pruning and FISH masks."""

import copy
import io
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.injection.site import named_adapters
from mmpeft.injection.weights import weights_of
from mmpeft.methods.adalora import AdaLoRA
from mmpeft.methods.allocator import best, span
from mmpeft.methods.diff_pruning import DiffPruning, hard_concrete, open_probability
from mmpeft.methods.fish import FISH
from mmpeft.methods.rank_allocator import importance, smoothed, triplets_at
from mmpeft.methods.sparse import largest
from tests.cases import randomize

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


class Network(nn.Module):
    """A convolution, a linear layer that runs twice, and one that shares its weight."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.hidden = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.hidden.weight
        self.out = nn.Linear(6, 4)

    def forward(self, x):
        x = self.conv(x).tanh().mean((2, 3))
        for layer in (self.hidden, self.hidden, self.tied):
            x = x + layer(x).tanh()
        return self.out(x)


def network():
    torch.manual_seed(11)
    return Network().double()


def adapted(config, **targets):
    """The network with adapters, and the adapters by path."""
    model = network()
    torch.manual_seed(12)
    mmpeft.inject(model, config, targets)
    return model, named_adapters(model)


def loss_of(model, step, micro=0):
    """A loss with the data and the noise of one step."""
    torch.manual_seed(1000 * step + micro)
    x, y = torch.randn(8, 3, 6, 6).double(), torch.randint(4, (8,))
    loss = nn.functional.cross_entropy(model(x), y)
    term = mmpeft.penalty(model)
    return loss if term is None else loss + term


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def train(model, optimizer, steps, after=lambda step: None):
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        after(step + 1)


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


# Choices


def test_best_keeps_exactly_the_count_and_the_first_of_equals():
    scores = torch.tensor([3.0, 1, 3, 2, 3, float('nan'), 2])
    expected = {1: [0], 2: [0, 2], 3: [0, 2, 4], 4: [0, 2, 3, 4], 5: [0, 2, 3, 4, 6]}
    for count, places in expected.items():
        assert best(scores, count).nonzero().flatten().tolist() == places
    assert best(scores, 7).all()
    assert best(torch.zeros(50), 7).nonzero().flatten().tolist() == list(range(7))
    infinite = torch.tensor([0.0, float('inf'), float('-inf'), float('nan')])
    assert best(infinite, 3).tolist() == [True, True, True, False]


def test_best_is_the_top_of_a_stable_sort():
    for seed in range(20):
        scores = np.random.default_rng(seed).integers(0, 9, 200).astype(float)
        expected = np.sort(np.argsort(-scores, kind='stable')[:77])
        np.testing.assert_array_equal(largest(torch.tensor(scores), 77), expected)


def test_spans_are_steps_or_shares_of_the_run():
    assert [span(v, 60) for v in (0, 7, 0.0, 0.1, 0.5)] == [0, 7, 0, 6, 30]


# AdaLoRA

RANKS = dict(type='AdaLoRA', rank=2, layout='loralib', warmup=10, settle=20, beta1=0.7, beta2=0.8)
OVERRIDES = {'out': dict(rank=1, init_rank=4)}
# Triplets of the convolution (3 for each rank), the linear pair and the last layer.
INITIAL, TARGET = 3 * 3 + 3 + 4, 3 * 2 + 2 + 1


def test_adalora_multiplies_three_factors():
    model, adapters = adapted(dict(type='AdaLoRA', rank=2, scale=0.7))
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
    model, adapters = adapted(RANKS | dict(orthogonality=0.3))
    randomize(model)
    expected = 0
    for adapter in adapters.values():
        p, q = adapter.lora_B.detach().numpy(), adapter.lora_A.detach().numpy()
        eye = np.eye(p.shape[1])
        term = 0.3 * (((p.T @ p - eye) ** 2).sum() + ((q @ q.T - eye) ** 2).sum())
        close(adapter.penalty().item(), term)
        expected += term
    close(mmpeft.penalty(model).item(), expected)
    assert mmpeft.penalty(adapted(RANKS | dict(orthogonality=0))[0]) is None


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
    model, adapters = adapted(RANKS | dict(every=every), overrides=OVERRIDES)
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
    model, adapters = adapted(RANKS | dict(every=3), overrides=OVERRIDES)
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
    model, adapters = adapted(RANKS | dict(warmup=0, settle=0, every=1, rank=1, layout='channel'))
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
    model, adapters = adapted(RANKS)
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


@pytest.mark.parametrize(
    'wrong',
    [
        dict(rank=8, init_rank=6),
        dict(warmup=1.5),
        dict(settle=-3),
        dict(every=0),
        dict(beta1=1.0),
        dict(layout='rows'),
        dict(rank=(2, 2)),
    ],
)
def test_adaloras_arguments_are_checked(wrong):
    with pytest.raises(UsageError, match='AdaLoRA'):
        AdaLoRA(**wrong)


@pytest.mark.parametrize(
    'config, overrides, words',
    [
        (RANKS, {}, 'exceed the 20 steps'),
        (RANKS, {'out': dict(warmup=3)}, 'warmup governs the whole run'),
        (dict(type='DiffPruning', project_at=30), {}, 'after the 20 steps'),
        (dict(type='FISH'), {'out': dict(samples=3)}, 'samples governs the whole run'),
    ],
)
def test_schedules_that_cannot_be_are_refused(config, overrides, words):
    model, _ = adapted(config, overrides=overrides)
    with pytest.raises(UsageError, match=words):
        mmpeft.allocate(model, torch.optim.SGD(trainable(model), 0.1), 20)


# Diff pruning


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
    model, adapters = adapted(config | dict(structured=structured))
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
    assert mmpeft.penalty(adapted(config | dict(l0_weight=0))[0]) is None


@pytest.mark.parametrize('structured', [False, True])
def test_diff_pruning_against_numpy(structured):
    config = dict(type='DiffPruning', start=0.5, gate_speed=2.0, structured=structured)
    model, adapters = adapted(config)
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
    model, _ = adapted(dict(type='DiffPruning', start=0.5))
    randomize(model)
    assert not torch.equal(model.conv.weight, model.conv.weight)
    model.eval()
    assert torch.equal(model.conv.weight, model.conv.weight)
    quiet, _ = adapted(dict(type='DiffPruning', start=0.5, sample=False))
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
    model, adapters = adapted(dict(type='DiffPruning', start=0.5, gate_speed=1000.0, sample=False))
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
    model, adapters = adapted(config | dict(start=1.0), overrides={'out': dict(density=0.5)})
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
    model, adapters = adapted(
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


@pytest.mark.parametrize(
    'method, wrong',
    [
        (DiffPruning, dict(density=0)),
        (DiffPruning, dict(density=1.2)),
        (DiffPruning, dict(project_at=1.0)),
        (DiffPruning, dict(gate_speed=0)),
        (FISH, dict(density=0)),
        (FISH, dict(samples=-1)),
        (FISH, dict(samples=0.1)),
    ],
)
def test_arguments_are_checked(method, wrong):
    with pytest.raises(UsageError, match=f'{method.__name__}: {next(iter(wrong))}='):
        method(**wrong)


# FISH masks


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
    model, adapters = adapted(dict(type='FISH', density=0.1))
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
    model, adapters = adapted(dict(type='FISH', density=0.1, samples=5))
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
        model, _ = adapted(dict(type='FISH'))
        optimizer = torch.optim.SGD(trainable(model), lr=0.1)
        (allocator,) = mmpeft.allocate(model, optimizer, steps).allocators
        assert allocator.samples == samples and bool(allocator.scores) is (samples > 0)


def test_a_step_that_overflowed_counts_for_nothing():
    model, adapters = adapted(dict(type='FISH', density=0.1, samples=5))
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    (allocator,) = mmpeft.allocate(model, optimizer, 40).allocators
    train(model, optimizer, [0])
    (loss_of(model, 1) * float('inf')).backward()
    optimizer.step()
    train(model, optimizer, [2])
    for score, square in zip(allocator.scores.values(), dense_squares([0, 2]), strict=True):
        np.testing.assert_allclose(score, square, rtol=1e-9, atol=1e-18)


def test_a_trained_fish_mask_is_kept_in_a_second_run():
    model, adapters = adapted(dict(type='FISH', density=0.1, samples=2))
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
    model, adapters = adapted(dict(type='FISH', density=0.1, samples=2))
    start = {path: a.index.clone() for path, a in adapters.items()}
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    mmpeft.allocate(model, optimizer, 40)
    for _ in range(3):
        model.out(torch.randn(5, 6).double()).square().sum().backward()
        optimizer.step()
    same = {path: torch.equal(a.index, start[path]) for path, a in adapters.items()}
    assert [path for path, equal in same.items() if not equal] == ['out.parametrizations.weight.0']


# All three

RUNS = dict(
    adalora=RANKS | dict(every=3),
    diff_pruning=dict(
        type='DiffPruning', density=0.1, project_at=30, structured=True, start=1.0, gate_speed=20.0
    ),
    fish=dict(type='FISH', density=0.1, samples=12),
)


def started(config, *states):
    """Model, optimizer and allocation of a run of 60 steps, each with its state if resumed."""
    model, _ = adapted(config)
    parts = [model, torch.optim.AdamW(trainable(model), lr=0.02)]
    for part, state in zip(parts, states, strict=False):
        part.load_state_dict(state)
    parts.append(mmpeft.allocate(*parts, 60))
    if states:
        parts[-1].load_state_dict(states[-1])
    return parts


def through_a_file(states):
    file = io.BytesIO()
    torch.save(states, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize('name', RUNS)
@pytest.mark.parametrize('stop', [5, 12, 25, 30, 40, 50])
def test_a_resumed_run_is_equal_to_the_last_bit(name, stop):
    through, optimizer, _ = started(RUNS[name])
    train(through, optimizer, range(60))

    stopped = started(RUNS[name])
    train(*stopped[:2], range(stop))
    states = through_a_file([part.state_dict() for part in stopped])
    resumed = started(RUNS[name], *states)
    train(*resumed[:2], range(stop, 60))
    assert [a.step for a in resumed[2].allocators] == [60]
    for key, value in through.state_dict().items():
        assert torch.equal(resumed[0].state_dict()[key], value), key


@pytest.mark.parametrize('name', RUNS)
def test_states_are_copies(name):
    model, optimizer, allocation = started(RUNS[name])
    train(model, optimizer, range(5))
    state = allocation.state_dict()
    kept = copy.deepcopy(state)
    train(model, optimizer, range(5, 9))
    assert repr(state) == repr(kept)


@pytest.mark.parametrize('name', RUNS)
def test_training_lowers_the_loss(name):
    model, optimizer, allocation = started(RUNS[name])
    x, y = torch.randn(16, 3, 6, 6).double(), torch.randint(4, (16,))

    def loss():
        return nn.functional.cross_entropy(model(x), y)

    with torch.no_grad():
        before = loss().item()
    for _ in range(60):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    allocation.close()
    model.eval()
    with torch.no_grad():
        assert loss().item() < 0.95 * before


def test_two_methods_on_one_model_have_an_allocator_each():
    model = network()
    mmpeft.inject(model, RUNS['fish'], dict(include='out'))
    mmpeft.inject(model, RUNS['adalora'], dict(include=('conv', 'hidden')))
    optimizer = torch.optim.AdamW(trainable(model), lr=0.02)
    allocation = mmpeft.allocate(model, optimizer, 60)
    assert {type(a).__name__ for a in allocation.allocators} == {'FisherMask', 'RankAllocator'}
    train(model, optimizer, range(60))
    lambdas = [a.lora_E for a in named_adapters(model).values() if hasattr(a, 'lora_E')]
    assert sum(int(value.count_nonzero()) for value in lambdas) == 3 * 2 + 2
