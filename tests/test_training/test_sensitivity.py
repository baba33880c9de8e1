"""Sensitivities against torch.autograd on the whole model and numpy's decompositions."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import mmpeft
from mmpeft.errors import TrainingError, UsageError
from mmpeft.injection.site import attached
from tests.networks import Net, Tied, assert_same, snapshot

BUDGET = 1500


class Mixed(nn.Module):
    """Layers of all roles, a norm whose statistics training would move, and one weight twice."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.ModuleDict(
            dict(
                stem=nn.Conv2d(3, 6, 3),
                norm=nn.BatchNorm2d(6),
                dw=nn.Conv2d(6, 6, 3, groups=6),
                up=nn.ConvTranspose2d(6, 4, 2),
                fc=nn.Linear(4, 7),
                again=nn.Linear(7, 7),
            )
        )
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        b = self.backbone
        x = b['up'](b['dw'](b['norm'](b['stem'](x)).relu())).mean((2, 3))
        x = b['again'](b['fc'](x).tanh())
        return self.head(b['again'](x))


def cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def data(channels=3, count=3):
    torch.manual_seed(5)
    return [(torch.randn(4, channels, 8, 8).double(), torch.randint(3, (4,))) for _ in range(count)]


@pytest.fixture(scope='module')
def gradients():
    """A model, and numpy's mean gradient of each weight over all batches at once."""
    torch.manual_seed(2)
    model = Mixed().double()
    model.backbone['norm'].running_var.uniform_(0.5, 2)
    model.train()
    whole = copy.deepcopy(model)
    whole.backbone.eval()
    names, weights = zip(*whole.named_parameters(), strict=True)
    loss = sum(cross_entropy(whole, batch) for batch in data()) / 3
    found = torch.autograd.grad(loss, weights)
    return model, {name: g.numpy() for name, g in zip(names, found, strict=True)}


def measured(model, **method):
    config = dict(budget=BUDGET) | method
    return mmpeft.sensitivity(model, config, data(), cross_entropy, dict(module='backbone'))


def squares(matrix):
    return np.linalg.svd(matrix, compute_uv=False) ** 2


def check(found, expected):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name].numpy(), values, rtol=1e-9, atol=1e-18)


def adapted(gradients):
    return {n: g for n, g in gradients.items() if 'backbone' in n and g.ndim > 1}


def test_lora_gains_the_squared_singular_values(gradients):
    model, whole = gradients
    before, random = snapshot(model), torch.get_rng_state()
    batches = ((x + 0 * torch.randn(8), y) for x, y in data())
    targets = dict(module='backbone')
    torch.set_rng_state(random)
    found = mmpeft.sensitivity(
        model, dict(type='LoRA', budget=BUDGET), batches, cross_entropy, targets
    )
    assert_same(model, before)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())
    expected = {name: squares(g.reshape(len(g), -1)) for name, g in adapted(whole).items()}
    check(found, expected)
    check(measured(model, type='MoSLoRA'), expected)


def test_in_loralibs_layout_a_rank_has_as_many_as_the_kernel_is_wide(gradients):
    model, whole = gradients
    found = measured(model, type='LoRA', layout='loralib')
    values = squares(whole['backbone.stem.weight'].reshape(6 * 3, 3 * 3))
    np.testing.assert_allclose(
        found['backbone.stem.weight'].numpy(), values.reshape(3, 3).sum(1), rtol=1e-9
    )


def test_a_lie_update_sees_the_product_with_the_weight(gradients):
    model, whole = gradients
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    found = measured(model, type='LieRA')
    expected = {
        name: squares((g * state[name]).reshape(len(g), -1)) for name, g in adapted(whole).items()
    }
    check(found, expected)


def test_dora_does_not_see_what_its_norm_divides_out(gradients):
    model, whole = gradients
    weight = model.backbone['fc'].weight.detach().numpy()
    gradient = whole['backbone.fc.weight']
    unit = weight / np.linalg.norm(weight, axis=1, keepdims=True)
    rest = gradient - unit * (unit * gradient).sum(1, keepdims=True)
    found = measured(model, type='DoRA')['backbone.fc.weight']
    np.testing.assert_allclose(found.numpy(), squares(rest), rtol=1e-9, atol=1e-18)
    found = measured(model, type='DoRA', detach_norm=True)['backbone.fc.weight']
    np.testing.assert_allclose(found.numpy(), squares(gradient), rtol=1e-9, atol=1e-18)


def test_flora_gains_what_its_modes_capture(gradients):
    """Projections onto numpy's left singular vectors of each unfolding, rank by rank."""
    model, whole = gradients
    found = measured(model, type='FLoRA', kernel_rank=2)

    def captured(gradient, ranks):
        core = gradient
        for mode, rank in enumerate(ranks):
            unfolded = np.moveaxis(gradient, mode, 0).reshape(gradient.shape[mode], -1)
            basis = np.linalg.svd(unfolded, full_matrices=False)[0][:, :rank]
            core = np.moveaxis(np.tensordot(basis.T, core, (1, mode)), 0, mode)
        return (core**2).sum()

    for name, gradient in adapted(whole).items():
        ranks = [(n, n, 2, 2)[: gradient.ndim] for n in range(1, max(gradient.shape[:2]) + 1)]
        sums = [0, *(captured(gradient, each) for each in ranks)]
        np.testing.assert_allclose(found[name].numpy(), np.diff(sums), rtol=1e-8, atol=1e-16)


def test_a_tied_weight_is_measured_once_in_all_its_uses():
    torch.manual_seed(0)
    model = Tied().double()
    batches = [torch.randint(9, (5,)) for _ in range(2)]

    def loss(model, index):
        return model(index).square().mean()

    targets = dict(kinds=('embedding', 'linear'))
    found = mmpeft.sensitivity(model, dict(type='LoRA', budget=99), batches, loss, targets)
    sum(loss(model, batch) / 2 for batch in batches).backward()
    for name in ('embed.weight', 'out.weight'):
        np.testing.assert_allclose(
            found[name].numpy(), squares(model.embed.weight.grad.numpy()), rtol=1e-9
        )


def test_weights_stored_the_other_way_round_in_a_reentrant_checkpoint():
    """GPT-2's layer behind a frozen one, against a linear layer; DoRA's norms tell rows apart."""
    torch.manual_seed(0)
    batches = [torch.randn(4, 5).double()]

    class Chain(nn.Sequential):
        def forward(self, x):
            return checkpoint(self[1], self[0](x), use_reentrant=True)

    def loss(model, batch):
        return (model(batch) ** 3).mean()

    plain = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 4)).double()
    turned = Chain(plain[0], Conv1D(4, 6).double())
    turned[1].weight.data, turned[1].bias.data = plain[1].weight.data.T.clone(), plain[1].bias.data
    found = [
        mmpeft.sensitivity(model, dict(type='DoRA', budget=99), batches, loss, dict(include='1'))
        for model in (plain, turned)
    ]
    assert found[0]['1.weight'].any()
    torch.testing.assert_close(*found, rtol=1e-9, atol=0)


def test_ranks_are_those_of_the_file(tmp_path):
    """One budget, other ranks; a plain base takes them from the adapter file."""
    torch.manual_seed(0)
    base = Net()
    model, batches = copy.deepcopy(base), [(x.float(), y) for x, y in data(8)]
    method, targets = dict(type='LoRA', budget=BUDGET), dict(module='backbone')
    found = mmpeft.sensitivity(model, method, batches, cross_entropy, targets)
    summary = mmpeft.inject(model, method, targets, sensitivity=found)
    ranks = {site.name: site.method.rank for site in attached(model)}
    assert len(set(ranks.values())) > 1 and summary.adapters <= BUDGET
    mmpeft.save_adapter(model, tmp_path / 'a.safetensors')
    mmpeft.load_adapter(base, tmp_path / 'a.safetensors')
    assert {site.name: site.method.rank for site in attached(base)} == ranks


def test_what_trained_before_trains_after_an_error():
    model = Net()
    model.head.weight.grad = torch.ones(3, 8)
    model.backbone[0].dw.weight.requires_grad_(False)
    before, gradient = snapshot(model), model.head.weight.grad

    def broken(model, batch):
        cross_entropy(model, batch).backward()
        raise RuntimeError('of the user')

    batches = [(x.float(), y) for x, y in data(8)]
    with pytest.raises(RuntimeError, match='of the user'):
        mmpeft.sensitivity(model, dict(type='LoRA', budget=BUDGET), batches, broken)
    assert_same(model, before)
    assert model.head.weight.grad is gradient and model.backbone[0].pw.weight.grad is None


def test_what_cannot_be_measured():
    batches = [(x.float(), y) for x, y in data(8)]
    lora = dict(type='LoRA', budget=BUDGET)

    def refused(error, text, method=lora, batches=batches, loss=cross_entropy, model=None):
        with pytest.raises(error, match=text):
            mmpeft.sensitivity(model or Net(), method, batches, loss, dict(module='backbone'))

    refused(UsageError, 'leaves no rank open', dict(type='LoRA', rank=3))
    for kind in ('VeRA', 'LoTR', 'PiSSA', 'AdaLoRA', 'HoulsbyAdapter'):
        refused(UsageError, f'not of {kind}', dict(type=kind, budget=BUDGET))
    refused(UsageError, 'no batch', batches=[])
    refused(TrainingError, 'all zero', loss=lambda model, batch: 0 * cross_entropy(model, batch))
    refused(TrainingError, 'all zero', loss=lambda model, batch: batch[0].mean())
    infinite = [(x * float('inf'), y) for x, y in batches]
    refused(TrainingError, 'not finite', batches=infinite)
    adapted = Net()
    mmpeft.inject(adapted, lora, dict(module='backbone'))
    refused(UsageError, 'is parametrized already', model=adapted)
