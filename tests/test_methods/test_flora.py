"""FLoRA: a Tucker update of the modes of a weight."""

import numpy as np
import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.methods.flora import FLoRA
from tests.adapting import adapted, close, count, spec_of, weights_of_all_layers

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


EINSUM = {
    2: 'ab,ia,jb->ij',
    3: 'abc,ia,jb,kc->ijk',
    4: 'abcd,ia,jb,kc,ld->ijkl',
    5: 'abcde,ia,jb,kc,ld,me->ijklm',
}


@pytest.mark.parametrize(
    'layer',
    [
        nn.Linear(6, 5),
        nn.Conv1d(4, 6, 3, groups=2),
        nn.Conv2d(4, 6, (3, 5)),
        nn.Conv2d(6, 6, 7, groups=6),
        nn.Conv3d(4, 5, (1, 2, 3)),
        nn.ConvTranspose2d(4, 6, 3, groups=2),
        nn.Embedding(9, 5),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_flora_is_tucker(layer):
    frozen, new, f = adapted(layer, dict(type='FLoRA', rank=3, kernel_rank=2, scale=0.7))
    modes = [f[f'factor{n}'] for n in range(frozen.ndim)]
    close(new, frozen + 0.7 * np.einsum(EINSUM[frozen.ndim], f['core'], *modes))


@pytest.mark.parametrize('rank, kernel_rank', [(2, 1), (3, 2), (64, 9)])
def test_flora_parameters_in_closed_form(rank, kernel_rank):
    method = FLoRA(rank=rank, kernel_rank=kernel_rank)
    for weight, spec in weights_of_all_layers():
        ranks = [min(rank, s) for s in spec.shape[:2]]
        ranks += [min(kernel_rank, s) for s in spec.shape[2:]]
        expected = np.prod(ranks) + sum(i * j for i, j in zip(spec.shape, ranks, strict=True))
        assert count(method.init(weight, spec)) == expected, spec


def test_flora_of_a_depthwise_kernel_has_rank_1_on_its_input_mode():
    spec = spec_of(nn.Conv2d(8, 8, 7, groups=8))
    assert FLoRA(rank=4, kernel_rank=2).ranks(spec) == (4, 1, 2, 2)


def test_flora_starts_with_a_zero_core_and_gaussian_factors():
    layer = nn.Linear(400, 300)
    factors = FLoRA(rank=50).init(layer.weight.detach(), spec_of(layer))
    assert not factors['core'].any()
    for name in ('factor0', 'factor1'):
        assert abs(factors[name].std().item() * 50**0.5 - 1) < 0.03
        assert abs(factors[name].mean().item()) < 0.005
    fixed = FLoRA(rank=50, init_std=0.02).init(layer.weight.detach(), spec_of(layer))
    assert abs(fixed['factor0'].std().item() / 0.02 - 1) < 0.03


def test_flora_may_start_with_a_zero_factor():
    """As LoRA does: at first the whole factor has a gradient, where a core has few numbers."""
    layer = nn.Conv2d(200, 300, 3)
    factors = FLoRA(rank=50, zero='factor0').init(layer.weight.detach(), spec_of(layer))
    assert [name for name, value in factors.items() if not value.any()] == ['factor0']
    assert abs(factors['core'].std().item() * 50**0.5 - 1) < 0.03
    assert abs(factors['factor1'].std().item() * 200**0.5 - 1) < 0.03
    fixed = FLoRA(rank=50, zero='factor0', init_std=0.02).init(layer.weight, spec_of(layer))
    assert all(abs(fixed[n].std().item() / 0.02 - 1) < 0.03 for n in ('core', 'factor1'))
    model = nn.Sequential(nn.Linear(6, 5))
    mmpeft.inject(model, dict(type='FLoRA', rank=2, zero='factor0'))
    model(torch.randn(3, 6)).square().sum().backward()
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    moved = {name.rpartition('.')[2]: bool(gradient.any()) for name, gradient in trained.items()}
    assert moved == dict(core=False, factor0=True, factor1=False)


def test_an_adam_step_on_floras_core_moves_weights_alike_at_every_rank():
    layer = nn.Linear(300, 200)
    moved = []
    for rank in (4, 32, 128):
        method = FLoRA(rank=rank, scale=1.0)
        factors = method.init(layer.weight.detach(), spec_of(layer))
        factors['core'] = torch.randn(rank, rank).sign()
        moved.append(method.delta(factors, spec_of(layer)).std().item())
    assert max(moved) / min(moved) < 1.3 and 0.8 < moved[-1] < 1.2


def test_flora_couples_with_the_lie_update():
    frozen, new, f = adapted(nn.Linear(6, 5), dict(type='FLoRA', rank=2, scale=2.0, update='lie'))
    close(new, frozen * (1 + 2 * f['factor0'] @ f['core'] @ f['factor1'].T))
