"""Each method's formula against an independent computation in numpy."""

import numpy as np
import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.injection.site import adapters_of
from mmpeft.injection.weights import weights_of
from mmpeft.methods.channels import draw_input_dropout, per_input
from mmpeft.methods.dora import DoRA
from mmpeft.methods.flora import FLoRA
from mmpeft.methods.lora import LoRA
from tests.cases import KINDS, LAYERS, METHODS, randomize

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


def spec_of(layer, name='weight'):
    return dict(weights_of(layer))[name]


def adapted(layer, config):
    """The frozen weight, the adapted one and the factors, as numpy arrays."""
    layer.double()
    mmpeft.inject(layer, config, dict(kinds=KINDS))
    randomize(layer)
    factors = {k: v.detach().numpy() for k, v in adapters_of(layer, 'weight')[0].factors.items()}
    frozen = layer.parametrizations.weight.original.detach().numpy()
    return frozen, layer.weight.detach().numpy(), factors


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


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


@pytest.mark.parametrize('name', LAYERS)
@pytest.mark.parametrize('rank, kernel_rank', [(2, 1), (3, 2), (64, 9)])
def test_flora_parameters_in_closed_form(name, rank, kernel_rank):
    layer = LAYERS[name].build()
    method = FLoRA(rank=rank, kernel_rank=kernel_rank)
    for module in layer.modules():
        for tensor, spec in weights_of(module):
            if spec.is_bias or len(spec.shape) < 2:
                continue
            sizes = list(getattr(module, tensor).shape)
            ranks = [min(rank, s) for s in sizes[:2]] + [min(kernel_rank, s) for s in sizes[2:]]
            expected = np.prod(ranks) + sum(i * j for i, j in zip(sizes, ranks, strict=True))
            factors = method.init(getattr(module, tensor).detach(), spec)
            assert sum(f.numel() for f in factors.values()) == expected


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


def test_an_adam_step_on_floras_core_moves_weights_alike_at_every_rank():
    layer = nn.Linear(300, 200)
    moved = []
    for rank in (4, 32, 128):
        method = FLoRA(rank=rank, scale=1.0)
        factors = method.init(layer.weight.detach(), spec_of(layer))
        factors['core'] = torch.randn(rank, rank).sign()
        moved.append(method.delta(factors, spec_of(layer)).std().item())
    assert max(moved) / min(moved) < 1.3 and 0.8 < moved[-1] < 1.2


def test_lora_on_a_matrix():
    frozen, new, f = adapted(nn.Linear(6, 5), dict(type='LoRA', rank=2, alpha=6))
    close(new, frozen + 3 * f['lora_B'] @ f['lora_A'])


@pytest.mark.parametrize('groups', [1, 2, 6])
def test_lora_on_a_kernel_in_loralibs_layout(groups):
    k, r, out = 3, 2, 6
    layer = nn.Conv2d(6, out, k, groups=groups)
    frozen, new, f = adapted(layer, dict(type='LoRA', rank=r, scale=0.5, layout='loralib'))
    assert f['lora_A'].shape == (r * k, 6 * k)
    assert f['lora_B'].shape == (out // groups * k, r * k)
    close(new, frozen + 0.5 * (f['lora_B'] @ f['lora_A']).reshape(frozen.shape))


def test_lora_on_a_kernel_in_the_channel_layout():
    frozen, new, f = adapted(
        nn.Conv2d(6, 8, (2, 3), groups=2), dict(type='LoRA', rank=2, layout='channel')
    )
    assert f['lora_A'].shape == (2, 3 * 2 * 3) and f['lora_B'].shape == (8, 2)
    expected = np.einsum('or,rikl->oikl', f['lora_B'], f['lora_A'].reshape(2, 3, 2, 3))
    close(new, frozen + expected)


@pytest.mark.parametrize(
    'name', ['conv1d', 'conv3d', 'transposed2d', 'transposed3d', 'conv2d_wide']
)
@pytest.mark.parametrize('layout', ['loralib', 'channel'])
def test_lora_fills_kernels_of_every_dimension(name, layout):
    layer = LAYERS[name].make()
    method = LoRA(rank=2, layout=layout)
    spec = spec_of(layer)
    factors = method.init(layer.weight.detach(), spec)
    assert method.delta(factors, spec).shape == layer.weight.shape


@pytest.mark.parametrize('update, function', [('lie', lambda d: 1 + d), ('lie_exact', np.exp)])
def test_liera_multiplies(update, function):
    layer = nn.Conv2d(4, 6, 3)
    frozen, new, f = adapted(layer, dict(type='LieRA', rank=2, scale=2.0, update=update))
    delta = 2 * (f['lora_B'] @ f['lora_A']).reshape(frozen.shape)
    close(new, frozen * function(delta))


def test_liera_is_lora_with_the_first_order_update():
    torch.manual_seed(1)
    one = adapted(nn.Linear(4, 4), dict(type='LieRA', rank=2))
    torch.manual_seed(1)
    two = adapted(nn.Linear(4, 4), dict(type='LoRA', rank=2, update='lie'))
    close(one[1], two[1])


def test_lie_updates_keep_zeros_and_signs():
    layer = nn.Linear(5, 5)
    nn.init.zeros_(layer.weight[0])
    frozen, new, _ = adapted(layer, dict(type='LieRA', rank=5, update='lie_exact'))
    assert not new[0].any()
    assert (np.sign(new) == np.sign(frozen)).all()


def test_flora_couples_with_the_lie_update():
    frozen, new, f = adapted(nn.Linear(6, 5), dict(type='FLoRA', rank=2, scale=2.0, update='lie'))
    close(new, frozen * (1 + 2 * f['factor0'] @ f['core'] @ f['factor1'].T))


@pytest.mark.parametrize('update', ['additive', 'lie', 'lie_exact'])
def test_dora_on_a_matrix(update):
    config = dict(type='DoRA', rank=2, scale=1.5, update=update)
    frozen, new, f = adapted(nn.Linear(6, 5), config)
    delta = 1.5 * f['lora_B'] @ f['lora_A']
    v = dict(additive=frozen + delta, lie=frozen * (1 + delta), lie_exact=frozen * np.exp(delta))[
        update
    ]
    close(new, f['magnitude'][:, None] * v / np.linalg.norm(v, axis=1, keepdims=True))


def test_doras_magnitude_starts_at_the_norm_of_the_pretrained_weight():
    layer = nn.Conv2d(4, 6, 3).double()
    factors = DoRA(rank=2).init(layer.weight.detach(), spec_of(layer))
    expected = np.linalg.norm(layer.weight.detach().numpy().reshape(6, -1), axis=1)
    close(factors['magnitude'].numpy(), expected)


@pytest.mark.parametrize('name', ['depthwise_multiplied', 'transposed2d', 'transposed1d', 'conv3d'])
def test_doras_norms_belong_to_output_channels(name):
    """The weights of an output channel are those that an impulse at the input finds."""
    layer = LAYERS[name].make().double()
    factors = DoRA(rank=1).init(layer.weight.detach(), spec_of(layer))
    nn.init.zeros_(layer.bias)
    weights = [[] for _ in range(layer.out_channels)]
    size = (1,) * (layer.weight.ndim - 2)
    if not layer.transposed:
        size = tuple(
            layer.dilation[i] * (layer.weight.shape[2 + i] - 1) + 1 for i in range(len(size))
        )
    for channel in range(layer.in_channels):
        for position in np.ndindex(*size):
            impulse = torch.zeros(1, layer.in_channels, *size, dtype=torch.float64)
            impulse[(0, channel, *position)] = 1
            response = layer(impulse).detach().numpy()[0]
            for out in range(layer.out_channels):
                weights[out].extend(response[out].ravel())
    expected = [np.linalg.norm(w) for w in weights]
    close(factors['magnitude'].numpy(), expected)


def test_dora_with_a_detached_norm_has_the_papers_gradient():
    layer = nn.Linear(6, 5).double()
    method, spec = DoRA(rank=2, detach_norm=True), spec_of(layer)
    weight = layer.weight.detach()
    factors = {k: v.requires_grad_() for k, v in method.init(weight, spec).items()}
    with torch.no_grad():
        factors['lora_B'].normal_()
    upstream = torch.randn_like(weight)
    (method.apply(weight, factors, spec) * upstream).sum().backward()
    v = weight + factors['lora_B'] @ factors['lora_A']
    ratio = (factors['magnitude'] / v.norm(dim=1)).detach()[:, None]
    torch.testing.assert_close(
        factors['lora_B'].grad, (ratio * upstream) @ factors['lora_A'].T, rtol=1e-12, atol=1e-12
    )


def test_bitfit_shifts_the_bias():
    layer = nn.Conv2d(3, 4, 3).double()
    mmpeft.inject(layer, METHODS['bitfit'])
    randomize(layer)
    before, shift = layer.parametrizations.bias.original, adapters_of(layer, 'bias')[0].shift
    assert not before.requires_grad and shift.requires_grad
    close(layer.bias.detach().numpy(), (before + shift).detach().numpy())


@pytest.mark.parametrize('name', ['linear', 'conv2d_circular', 'depthwise', 'transposed2d'])
def test_dropout_drops_input_channels(name):
    """phi with dropout on an input is phi without it on an input with channels dropped."""
    case = LAYERS[name]
    layer, x = case.make().double(), case.input()
    spec = spec_of(layer)
    mask = per_input(draw_input_dropout(layer.weight, spec, 0.5), spec)
    assert set(mask.unique().tolist()) <= {0.0, 2.0}
    position = x.ndim - 1 if name == 'linear' else 1
    per_channel = torch.zeros(spec.in_features, dtype=torch.float64)
    full = mask.expand(spec.shape)
    for channel in range(spec.in_features):
        group, within = divmod(channel, spec.in_features // spec.groups)
        rows = spec.shape[0] // spec.groups
        picked = full[channel] if spec.input_first else full[group * rows, within]
        per_channel[channel] = picked.flatten()[0]
    shape = [1] * x.ndim
    shape[position] = -1
    nn.init.zeros_(layer.bias)
    expected = layer(x * per_channel.view(shape))
    with torch.no_grad():
        layer.weight.mul_(mask)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_dropout_acts_in_training_alone_and_keeps_the_mean():
    layer = nn.Linear(4, 3).double()
    mmpeft.inject(layer, dict(type='LoRA', rank=2, dropout=0.4))
    randomize(layer)
    layer.eval()
    expected = layer.weight.detach()
    assert torch.equal(layer.weight, expected)
    layer.train()
    draws = torch.stack([layer.weight.detach() for _ in range(4000)])
    assert draws.std(0).max() > 0.05
    torch.testing.assert_close(draws.mean(0), expected, rtol=0.1, atol=0.02)


def test_pafi_trains_the_smallest_entries():
    layer = nn.Conv2d(4, 6, 3)
    frozen, new, f = adapted(layer, dict(type='PaFi', density=0.1))
    smallest = np.sort(np.argsort(np.abs(frozen).ravel(), kind='stable')[:22])
    assert (f['index'] == smallest).all() and f['values'].shape == (22,)
    expected = frozen.copy().ravel()
    expected[smallest] += f['values']
    close(new, expected.reshape(frozen.shape))
