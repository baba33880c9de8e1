"""TriLoRA: a diagonal between two factors."""

import numpy as np
import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.injection.site import adapters_of
from mmpeft.methods.lora import LoRA
from mmpeft.methods.trilora import TriLoRA
from tests.adapting import LAYOUTS, adapted, close, spec_of, weights_of_all_layers

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


@pytest.mark.parametrize('layout', LAYOUTS)
def test_trilora_is_b_diag_lambda_a(layer, layout):
    config = dict(type='TriLoRA', rank=2, alpha=6, layout=layout)
    frozen, new, f = adapted(layer, config)
    product = f['lora_B'] @ np.diag(f['lora_lambda']) @ f['lora_A']
    close(new, frozen + 3 * product.reshape(frozen.shape))


@pytest.mark.parametrize('layout', LAYOUTS)
def test_trilora_has_one_lambda_for_each_inner_index_of_lora(layout):
    for weight, spec in weights_of_all_layers():
        lora = LoRA(rank=3, layout=layout).init(weight, spec)
        factors = TriLoRA(rank=3, layout=layout).init(weight, spec)
        inner = len(lora['lora_A'])
        assert {k: v.shape for k, v in factors.items()} == {
            **{k: v.shape for k, v in lora.items()},
            'lora_lambda': (inner,),
        }
        half = len(spec.kernel_size) // 2
        assert inner == 3 * (np.prod(spec.kernel_size[:half]) if layout == 'loralib' else 1)


def test_trilora_starts_with_a_zero_lambda_between_gaussian_factors():
    layer = nn.Linear(400, 300)
    for config, std in ((dict(), 0.02), (dict(init_std=0.1), 0.1)):
        factors = TriLoRA(rank=50, **config).init(layer.weight.detach(), spec_of(layer))
        assert not factors['lora_lambda'].any()
        for name in ('lora_A', 'lora_B'):
            assert abs(factors[name].std().item() / std - 1) < 0.03
            assert abs(factors[name].mean().item() / std) < 0.03


def test_trilora_trains_lambda_first_and_everything_from_the_second_step_on():
    layer = nn.Linear(6, 5).double()
    mmpeft.inject(layer, dict(type='TriLoRA', rank=2))
    own = adapters_of(layer, 'weight')[0]
    x = torch.randn(4, 6, dtype=torch.float64)
    moving = []
    for _ in range(2):
        layer.zero_grad()
        layer(x).square().sum().backward()
        moving.append({name for name, p in own.named_parameters() if p.grad.any()})
        with torch.no_grad():
            own.lora_lambda -= 0.1 * own.lora_lambda.grad
    assert moving == [{'lora_lambda'}, {'lora_lambda', 'lora_A', 'lora_B'}]


def test_trilora_can_be_any_matrix_of_its_rank_with_orthogonal_factors():
    """The compact SVD of an update, put into the factors, is that update at penalty 0."""
    layer = nn.Linear(6, 5).double()
    method, spec = TriLoRA(rank=2, mpc='o'), spec_of(layer)
    update = torch.randn(5, 2, dtype=torch.float64) @ torch.randn(2, 6, dtype=torch.float64)
    u, s, vt = torch.linalg.svd(update)
    factors = {'lora_B': u[:, :2], 'lora_lambda': s[:2], 'lora_A': vt[:2]}
    torch.testing.assert_close(method.delta(factors, spec), update, rtol=1e-12, atol=1e-12)
    assert method.penalty(factors, spec) < 1e-25
