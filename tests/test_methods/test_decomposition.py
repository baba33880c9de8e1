"""What holds for all methods that start from a decomposition of the weight."""

import numpy as np
import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.injection.site import adapter_parameters, adapters_of, named_adapters
from mmpeft.methods import decomposition
from tests.adapting import close, refused_beyond
from tests.cases import KINDS, LAYERS, randomize

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


CONFIGS = dict(
    sam_parser=dict(type='SAMPARSER'),
    sam_parser_leading=dict(type='SAMPARSER', rank=2),
    svdiff=dict(type='SVDiff'),
    pissa=dict(type='PiSSA', rank=2),
    pissa_fast=dict(type='PiSSA', rank=2, niter=2),
    pissa_loralib=dict(type='PiSSA', rank=1, layout='loralib'),
    milora=dict(type='MiLoRA', rank=2),
    spectral=dict(type='SpectralAdapter', rank=2),
)


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.mark.parametrize('shape', [(60, 200), (200, 60)])
def test_the_randomised_decomposition_finds_the_principal_part(shape, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(torch.linalg, 'svd', refused_beyond(20))
    matrix = torch.randn(shape[0], 60).double() @ torch.diag(0.8 ** torch.arange(60).double())
    matrix = matrix @ torch.randn(60, shape[1]).double()
    left, values, right = decomposition.leading(matrix, 6, niter=4)
    exact = np.linalg.svd(matrix.numpy(), full_matrices=False)
    close(values.numpy(), exact[1][:6], 1e-3)
    principal = exact[0][:, :6] * exact[1][:6] @ exact[2][:6]
    found = (left * values @ right).numpy()
    assert np.linalg.norm(found - principal) < 0.02 * np.linalg.norm(principal)
    close((left.T @ left).numpy(), np.eye(6))


@pytest.mark.parametrize('config', [CONFIGS['pissa'], CONFIGS['milora'], CONFIGS['spectral']])
@pytest.mark.parametrize('rank', [1, 3, 4])
def test_low_rank_in_closed_form_with_ranks_that_are_capped(layer, config, rank):
    n, m = len(layer.weight), layer.weight[0].numel()
    summary = mmpeft.inject(layer, config | dict(rank=rank), dict(kinds=KINDS))
    assert summary.adapters == min(rank, n, m) * (n + m)


@pytest.mark.parametrize('config', [CONFIGS['pissa'], CONFIGS['milora'], CONFIGS['spectral']])
def test_a_rank_is_capped_by_each_weight_and_refused_beyond_all(config):
    for device in ('cpu', 'meta'):
        with torch.device(device):
            model = nn.Sequential(nn.Linear(6, 5), nn.Linear(4, 8), nn.Conv2d(4, 9, 3))
        summary = mmpeft.inject(model, config | dict(rank=9))
        assert [row.adapter for row in summary.rows] == [5 * 11, 4 * 12, 9 * 45]
    mmpeft.remove(model)
    with pytest.raises(UsageError, match='the largest possible is 9'):
        mmpeft.inject(model, config | dict(rank=10))


def test_trained_values_start_at_zero_and_triplets_are_stored(config):
    model = nn.Sequential(nn.Linear(6, 5), nn.Conv2d(4, 6, 3))
    mmpeft.inject(model, config)
    assert not any(p.any() for p in adapter_parameters(model))
    assert all(
        key in model.state_dict()
        for path, adapter in named_adapters(model).items()
        for key in (f'{path}.{name}' for name in adapter.factors)
    )
    assert all(
        f.is_contiguous() for a in named_adapters(model).values() for f in a.factors.values()
    )


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_decompositions_are_in_the_factors_precision(config, dtype, monkeypatch):
    seen = []
    for module, name in ((torch.linalg, 'svd'), (torch, 'svd_lowrank')):
        monkeypatch.setattr(module, name, _watched(getattr(module, name), seen))
    model = nn.Sequential(nn.Linear(6, 5)).to(dtype)
    mmpeft.inject(model, config)
    expected = torch.promote_types(dtype, torch.float32)
    assert set(seen) == {expected}
    adapter = adapters_of(model[0], 'weight')[0]
    assert {f.dtype for f in adapter.factors.values()} == {expected}


def _watched(function, seen):
    def watched(matrix, *args, **kwargs):
        seen.append(matrix.dtype)
        return function(matrix, *args, **kwargs)

    return watched


def refuse_decompositions(monkeypatch):
    """Shapes alone, on the meta device, cost nothing."""
    for module, name in ((torch.linalg, 'svd'), (torch, 'svd_lowrank')):
        monkeypatch.setattr(module, name, _meta_only(getattr(module, name)))


def _meta_only(function):
    def checked(matrix, *args, **kwargs):
        assert matrix.is_meta, 'a decomposition ran'
        return function(matrix, *args, **kwargs)

    return checked


def build():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.Linear(24, 5)).double()


def test_a_saved_adapter_is_loaded_without_a_decomposition(config, tmp_path, monkeypatch):
    model, x = build(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    fresh = build()
    fresh.load_state_dict(model.state_dict())
    mmpeft.inject(model, config)
    randomize(model)
    path = mmpeft.save_adapter(model, tmp_path / 'adapter.safetensors')
    refuse_decompositions(monkeypatch)
    mmpeft.load_adapter(fresh, path)
    assert torch.equal(fresh(x), model(x))


def test_no_decomposition_on_the_meta_device(config, monkeypatch):
    real = mmpeft.inject(build(), config).to_dict()
    refuse_decompositions(monkeypatch)
    with torch.device('meta'):
        empty = build()
    assert mmpeft.inject(empty, config).to_dict() == real


def test_the_weights_that_were_loaded_are_decomposed(config):
    """Published PiSSA decomposes the random weights, before the pretrained ones are loaded."""
    pretrained = {k: 3 * v + 0.1 for k, v in build().state_dict().items()}
    model = build()
    model.load_state_dict(pretrained)
    mmpeft.inject(model, config)
    factors = adapters_of(model[2], 'weight')[0].factors
    weight = pretrained['2.weight']
    if 'left' in factors:
        triplets = factors['left'], factors['values'], factors['right']
    else:
        strength = factors['start_B'].norm(dim=0)
        triplets = (
            factors['start_B'] / strength,
            strength**2,
            factors['start_A'] / strength[:, None],
        )
    found = torch.einsum('nk,nm,km->k', triplets[0], weight, triplets[2])
    torch.testing.assert_close(found, triplets[1], rtol=1e-8, atol=1e-8)


def test_every_trained_value_moves_under_adamw(config):
    """Published loralib makes new parameters in forward, behind the optimizer's back."""
    torch.manual_seed(0)
    model = build()
    mmpeft.inject(model, config)
    parameters = dict(model.named_parameters())
    fixed = {n: b.clone() for n, b in model.named_buffers()}
    weights = [model[0].weight.detach().clone(), model[2].weight.detach().clone()]
    optimizer = torch.optim.AdamW(adapter_parameters(model), lr=1e-2, weight_decay=0.05)
    x, y = torch.randn(16, 3, 4, 4, dtype=torch.float64), torch.randn(16, 5, dtype=torch.float64)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses == sorted(losses, reverse=True)
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        if parameter.requires_grad:
            assert (parameter != 0).all(), name
    assert all(torch.equal(b, fixed[n]) for n, b in model.named_buffers())
    for layer, before in zip((model[0], model[2]), weights, strict=True):
        assert (layer.weight - before).norm() > 1e-3 * before.norm()


def test_every_trained_value_has_a_gradient_at_the_first_step(config):
    model = build()
    mmpeft.inject(model, config)
    model(torch.randn(8, 3, 4, 4, dtype=torch.float64)).square().sum().backward()
    assert all(p.grad.abs().min() > 0 for p in adapter_parameters(model))


def test_weight_decay_draws_to_the_pretrained_weight(config):
    model = nn.Sequential(nn.Linear(6, 5)).double()
    mmpeft.inject(model, config)
    randomize(model)
    optimizer = torch.optim.AdamW(adapter_parameters(model), lr=0.1, weight_decay=5)
    for _ in range(60):
        optimizer.zero_grad()
        (0 * model[0].weight.sum()).backward()
        optimizer.step()
    original = model[0].parametrizations.weight.original
    torch.testing.assert_close(model[0].weight, original, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('name', ['sam_parser', 'svdiff', 'pissa', 'milora', 'spectral'])
def test_a_weight_of_zeros_and_one_of_rank_one(name):
    layers = nn.Linear(6, 5), nn.Linear(5, 4)
    nn.init.zeros_(layers[0].weight)
    nn.init.ones_(layers[1].weight)
    model = nn.Sequential(*layers).double()
    before = [layer.weight.detach().clone() for layer in layers]
    mmpeft.inject(model, CONFIGS[name])
    assert all(torch.equal(a.weight, b) for a, b in zip(layers, before, strict=True))
    model(torch.randn(3, 6, dtype=torch.float64)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in adapter_parameters(model))


def test_attention_projections_are_decomposed_as_stored():
    model = LAYERS['attention'].build()
    mmpeft.inject(model, CONFIGS['pissa'])
    attention = model[0].attn
    adapter = adapters_of(attention, 'in_proj_weight')[0]
    left, values, right = np.linalg.svd(
        attention.parametrizations.in_proj_weight.original.detach().numpy(), full_matrices=False
    )
    principal = (adapter.start_B @ adapter.start_A).numpy()
    close(principal, left[:, :2] * values[:2] @ right[:2])
