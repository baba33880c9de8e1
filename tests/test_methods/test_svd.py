"""The methods that start from singular values and vectors of the pretrained weight."""

import numpy as np
import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.injection.site import adapter_parameters, adapters_of, named_adapters
from mmpeft.injection.weights import weights_of
from mmpeft.methods import decomposition
from mmpeft.methods.mpc import mpc_d
from tests.cases import KINDS, LAYERS, randomize

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')

METHODS = dict(
    sam_parser=dict(type='SAMPARSER'),
    sam_parser_leading=dict(type='SAMPARSER', rank=2),
    svdiff=dict(type='SVDiff'),
    pissa=dict(type='PiSSA', rank=2),
    pissa_fast=dict(type='PiSSA', rank=2, niter=2),
    pissa_loralib=dict(type='PiSSA', rank=1, layout='loralib'),
    milora=dict(type='MiLoRA', rank=2),
    spectral=dict(type='SpectralAdapter', rank=2),
)
SHAPES = dict(
    wide=lambda: nn.Linear(9, 5),
    tall=lambda: nn.Linear(4, 7),
    grouped=lambda: nn.Conv2d(4, 6, 3, groups=2),
    depthwise=lambda: nn.Conv2d(6, 6, 3, groups=6),
    conv1d=lambda: nn.Conv1d(4, 6, 3),
    conv3d=lambda: nn.Conv3d(2, 4, (1, 3, 2)),
    transposed=lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
    embedding=lambda: nn.Embedding(9, 5),
)


@pytest.fixture(params=METHODS)
def config(request):
    return METHODS[request.param]


@pytest.fixture(params=SHAPES)
def layer(request):
    return SHAPES[request.param]().double()


def adapted(layer, config, std=0.3):
    """The frozen weight, the adapted one and the factors, as numpy arrays."""
    mmpeft.inject(layer, config, dict(kinds=KINDS))
    randomize(layer, std)
    factors = {k: v.detach().numpy() for k, v in adapters_of(layer, 'weight')[0].factors.items()}
    frozen = layer.parametrizations.weight.original.detach().numpy()
    return frozen, layer.weight.detach().numpy(), factors


def close(a, b, tolerance=1e-12):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def numpy_svd(weight, like=None):
    """U, S, V of the kernel as a matrix; signs of U's first columns as in ``like``."""
    left, values, right = np.linalg.svd(weight.reshape(len(weight), -1), full_matrices=False)
    right = right.T
    if like is not None:
        signs = np.sign((left[:, : like.shape[1]] * like).sum(0))
        left[:, : like.shape[1]] *= signs
        right[:, : like.shape[1]] *= signs
    return left, values, right


# --- SAM-PARSER and SVDiff


@pytest.mark.parametrize('rank', [None, 2])
def test_sam_parser_shifts_singular_values(layer, rank):
    frozen, new, f = adapted(layer, dict(type='SAMPARSER', rank=rank))
    left, values, right = numpy_svd(frozen, f['left'])
    k = len(f['shift'])
    values[:k] += f['shift']
    close(new, (left * values @ right.T).reshape(frozen.shape))


@pytest.mark.parametrize('rank', [None, 2])
def test_svdiff_shifts_singular_values_down_to_zero(layer, rank):
    frozen, new, f = adapted(layer, dict(type='SVDiff', rank=rank), std=2.0)
    with torch.no_grad():  # of the two that always train, one that is cut and one that is not
        shift = adapters_of(layer, 'weight')[0].shift
        shift[:2] = torch.tensor([-10.0, 0.5])
        f['shift'], new = shift.numpy(), layer.weight.numpy()
    left, values, right = numpy_svd(frozen, f['left'])
    k = len(f['shift'])
    values[:k] = np.maximum(values[:k] + f['shift'], 0)
    close(new, (left * values @ right.T).reshape(frozen.shape))


@pytest.mark.parametrize('method', ['SAMPARSER', 'SVDiff'])
@pytest.mark.parametrize('rank', [None, 1, 3, 100])
def test_singular_values_in_closed_form(layer, method, rank):
    n, m = len(layer.weight), layer.weight[0].numel()
    summary = mmpeft.inject(layer, dict(type=method, rank=rank), dict(kinds=KINDS))
    k = min(n, m) if rank is None else min(rank, n, m)
    assert summary.adapters == k
    stored = mmpeft.checkpoint.keys.adapter_state_dict(layer)
    assert sum(v.numel() for v in stored.values()) == k + k * (n + m) + k


@pytest.mark.parametrize('method', ['SAMPARSER', 'SVDiff'])
@pytest.mark.parametrize('rank', [0, -1])
def test_no_number_of_singular_values(method, rank):
    with pytest.raises(UsageError, match='number of leading singular values'):
        mmpeft.METHODS.build(dict(type=method, rank=rank))


# --- PiSSA and MiLoRA

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


@pytest.mark.parametrize('config', [METHODS['pissa'], METHODS['milora'], METHODS['spectral']])
@pytest.mark.parametrize('rank', [1, 3, 4])
def test_low_rank_in_closed_form_with_ranks_that_are_capped(layer, config, rank):
    n, m = len(layer.weight), layer.weight[0].numel()
    summary = mmpeft.inject(layer, config | dict(rank=rank), dict(kinds=KINDS))
    assert summary.adapters == min(rank, n, m) * (n + m)


@pytest.mark.parametrize('config', [METHODS['pissa'], METHODS['milora'], METHODS['spectral']])
def test_a_rank_is_capped_by_each_weight_and_refused_beyond_all(config):
    for device in ('cpu', 'meta'):
        with torch.device(device):
            model = nn.Sequential(nn.Linear(6, 5), nn.Linear(4, 8), nn.Conv2d(4, 9, 3))
        summary = mmpeft.inject(model, config | dict(rank=9))
        assert [row.adapter for row in summary.rows] == [5 * 11, 4 * 12, 9 * 45]
    mmpeft.remove(model)
    with pytest.raises(UsageError, match='the largest possible is 9'):
        mmpeft.inject(model, config | dict(rank=10))


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
@pytest.mark.parametrize('scale', [dict(scale=0.0), dict(scale=-1.0), dict(alpha=0)], ids=str)
def test_singular_values_are_not_divided_by_nothing(method, scale):
    with pytest.raises(UsageError, match='must be positive, because singular values are divided'):
        mmpeft.METHODS.build(dict(type=method, **scale))


def test_no_number_of_iterations():
    with pytest.raises(UsageError, match='niter=-1 must be a number of power iterations'):
        mmpeft.METHODS.build(dict(type='PiSSA', niter=-1))


@pytest.mark.parametrize('shape', [(60, 200), (200, 60)])
def test_the_randomised_decomposition_finds_the_principal_part(shape, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(torch.linalg, 'svd', _refused_beyond(20))
    matrix = torch.randn(shape[0], 60).double() @ torch.diag(0.8 ** torch.arange(60).double())
    matrix = matrix @ torch.randn(60, shape[1]).double()
    left, values, right = decomposition.leading(matrix, 6, niter=4)
    exact = np.linalg.svd(matrix.numpy(), full_matrices=False)
    close(values.numpy(), exact[1][:6], 1e-3)
    principal = exact[0][:, :6] * exact[1][:6] @ exact[2][:6]
    found = (left * values @ right).numpy()
    assert np.linalg.norm(found - principal) < 0.02 * np.linalg.norm(principal)
    close((left.T @ left).numpy(), np.eye(6))


def test_pissa_with_iterations_takes_the_randomised_decomposition(monkeypatch):
    monkeypatch.setattr(torch.linalg, 'svd', _refused_beyond(20))
    layer = nn.Linear(80, 60).double()
    nn.init.orthogonal_(layer.weight)
    with torch.no_grad():
        layer.weight.mul_(0.5 ** torch.arange(80))
    frozen, new, f = adapted(layer, dict(type='PiSSA', rank=4, scale=2.0, niter=4), std=0)
    assert (new == frozen).all()
    left, values, right = np.linalg.svd(frozen, full_matrices=False)
    close(2 * f['start_B'] @ f['start_A'], left[:, :4] * values[:4] @ right[:4], 1e-8)


def _refused_beyond(size, svd=torch.linalg.svd):
    def small(matrix, *args, **kwargs):
        assert min(matrix.shape) <= size, 'an exact decomposition of the whole matrix'
        return svd(matrix, *args, **kwargs)

    return small


# --- Spectral Adapter


def test_spectral_adapter_shifts_the_top_singular_vectors(layer):
    r = 2
    frozen, new, f = adapted(layer, dict(type='SpectralAdapter', rank=r))
    left, values, right = numpy_svd(frozen, f['left'])
    left[:, :r] += f['shift_left']
    right[:, :r] += f['shift_right'].T
    close(new, (left * values @ right.T).reshape(frozen.shape))


def test_spectral_adapter_has_one_rank():
    with pytest.raises(UsageError, match='one integer'):
        mmpeft.METHODS.build(dict(type='SpectralAdapter', rank=(2, 3)))


# --- What holds for all of them


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
    def refuse(*args, **kwargs):
        raise AssertionError('a decomposition ran')

    monkeypatch.setattr(torch.linalg, 'svd', refuse)
    monkeypatch.setattr(torch, 'svd_lowrank', refuse)


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
    mmpeft.inject(model, METHODS[name])
    assert all(torch.equal(a.weight, b) for a, b in zip(layers, before, strict=True))
    model(torch.randn(3, 6, dtype=torch.float64)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in adapter_parameters(model))


def test_attention_projections_are_decomposed_as_stored():
    model = LAYERS['attention'].build()
    mmpeft.inject(model, METHODS['pissa'])
    attention = model[0].attn
    adapter = adapters_of(attention, 'in_proj_weight')[0]
    left, values, right = np.linalg.svd(
        attention.parametrizations.in_proj_weight.original.detach().numpy(), full_matrices=False
    )
    principal = (adapter.start_B @ adapter.start_A).numpy()
    close(principal, left[:, :2] * values[:2] @ right[:2])
