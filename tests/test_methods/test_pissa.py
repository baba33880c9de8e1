"""PiSSA and MiLoRA: LoRA that starts at singular triplets."""

import numpy as np
import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.injection.site import adapters_of
from mmpeft.injection.weights import weights_of
from mmpeft.methods.mpc import mpc_d
from tests.adapting import adapted, close, numpy_svd, refused_beyond

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


CHOICES = dict(PiSSA=lambda r: slice(0, r), MiLoRA=lambda r: slice(-r, None))


@pytest.mark.parametrize('method', CHOICES)
@pytest.mark.parametrize('scale', [dict(), dict(alpha=8), dict(scale=0.3)], ids=str)
def test_residual_and_adapter(layer, method, scale):
    """The papers' form: W without the chosen triplets, plus s B A that starts at them."""
    r = 2
    frozen, new, f = adapted(layer, dict(type=method, rank=r, **scale))
    s = scale.get('scale', scale.get('alpha', r) / r)
    left, values, right = (x[..., CHOICES[method](r)] for x in numpy_svd(frozen))
    signs = np.sign((left * f['start_B']).sum(0))
    start_b = left * signs * np.sqrt(values / s)
    start_a = (right * signs * np.sqrt(values / s)).T
    close(f['start_B'], start_b)
    close(f['start_A'], start_a)
    residual = frozen.reshape(len(frozen), -1) - left * values @ right.T
    adapter = s * (start_b + f['lora_B']) @ (start_a + f['lora_A'])
    close(new, (residual + adapter).reshape(frozen.shape))


@pytest.mark.parametrize('method', CHOICES)
@pytest.mark.parametrize('update, function', [('lie', lambda d: 1 + d), ('lie_exact', np.exp)])
def test_liera_on_pissa(layer, method, update, function):
    frozen, new, f = adapted(layer, dict(type=method, rank=2, scale=1.5, update=update))
    b, a = f['start_B'] + f['lora_B'], f['start_A'] + f['lora_A']
    delta = 1.5 * (b @ a - f['start_B'] @ f['start_A']).reshape(frozen.shape)
    close(new, frozen * function(delta))


def test_pissa_in_loralibs_layout_decomposes_the_reshaped_matrix():
    layer = nn.Conv2d(4, 6, 3, groups=2).double()
    frozen, new, f = adapted(layer, dict(type='PiSSA', rank=1, layout='loralib'))
    matrix = frozen.reshape(6 // 2 * 3, 4 * 3)
    left, values, right = np.linalg.svd(matrix)
    close(f['start_B'] @ f['start_A'], left[:, :3] * values[:3] @ right[:3])
    b, a = f['start_B'] + f['lora_B'], f['start_A'] + f['lora_A']
    close(new, frozen + (b @ a - f['start_B'] @ f['start_A']).reshape(frozen.shape))


def test_the_largest_rank_of_pissa_is_its_layouts():
    spec = dict(weights_of(nn.Conv2d(8, 12, 3)))['weight']
    channel, loralib = (
        mmpeft.METHODS.build(dict(type='PiSSA', layout=layout)).max_rank(spec)
        for layout in ('channel', 'loralib')
    )
    assert (channel, loralib) == (12, 8)


def test_mpc_constrains_what_pissas_factors_are_and_not_their_change():
    layer = nn.Linear(6, 5).double()
    _, _, f = adapted(layer, dict(type='PiSSA', rank=2, mpc='d', mpc_weight=0.5))
    b, a = (torch.from_numpy(f[f'start_{x}'] + f[f'lora_{x}']) for x in 'BA')
    torch.testing.assert_close(adapters_of(layer, 'weight')[0].penalty(), 0.5 * mpc_d(b, a))


@pytest.mark.parametrize('method', CHOICES)
@pytest.mark.parametrize('scale', [dict(scale=-1.0), dict(alpha=0)], ids=str)
def test_singular_values_are_not_divided_by_nothing(method, scale):
    with pytest.raises(UsageError, match='must be positive, because singular values are divided'):
        mmpeft.METHODS.build(dict(type=method, **scale))


def test_pissa_with_iterations_takes_the_randomised_decomposition(monkeypatch):
    monkeypatch.setattr(torch.linalg, 'svd', refused_beyond(20))
    layer = nn.Linear(80, 60).double()
    nn.init.orthogonal_(layer.weight)
    with torch.no_grad():
        layer.weight.mul_(0.5 ** torch.arange(80))
    frozen, new, f = adapted(layer, dict(type='PiSSA', rank=4, scale=2.0, niter=4), std=0)
    assert (new == frozen).all()
    left, values, right = np.linalg.svd(frozen, full_matrices=False)
    close(2 * f['start_B'] @ f['start_A'], left[:, :4] * values[:4] @ right[:4], 1e-8)
