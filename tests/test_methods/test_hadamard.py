"""LoHa and LoKr: elementwise and Kronecker products of low-rank blocks."""

import copy
from math import prod

import numpy as np
import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.injection.site import adapters_of
from mmpeft.injection.weights import weights_of
from mmpeft.methods.loha import LoHa
from mmpeft.methods.lokr import LoKr, split
from tests.cases import KINDS, LAYERS, randomize

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')

TUCKER = {3: 'abk,ia,bj->ijk', 4: 'abkl,ia,bj->ijkl', 5: 'abklm,ia,bj->ijklm'}


def spec_of(layer):
    return dict(weights_of(layer))['weight']


def init(layer, method):
    return method.init(layer.weight.detach().double(), spec_of(layer))


def adapted(layer, config):
    """The frozen weight, the adapted one and the factors, as numpy arrays."""
    layer = copy.deepcopy(layer).double()
    mmpeft.inject(layer, config, dict(kinds=KINDS))
    randomize(layer)
    factors = {k: v.detach().numpy() for k, v in adapters_of(layer, 'weight')[0].factors.items()}
    frozen = layer.parametrizations.weight.original.detach().numpy()
    return frozen, layer.weight.detach().numpy(), factors


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def weights():
    """Weight and role of all matrices and kernels of the table of layers."""
    for name, case in LAYERS.items():
        for module in case.build().modules():
            for tensor, spec in weights_of(module):
                if len(spec.shape) > 1:
                    yield pytest.param(
                        getattr(module, tensor).detach(), spec, id=f'{name}.{tensor}'
                    )


def count(factors):
    return sum(factor.numel() for factor in factors.values())


@pytest.mark.parametrize('layer', [nn.Linear(6, 5), nn.Embedding(9, 5)], ids=['linear', 'entries'])
def test_loha_on_a_matrix(layer):
    frozen, new, f = adapted(layer, dict(type='LoHa', rank=2, alpha=6))
    close(new, frozen + 3 * (f['loha_B1'] @ f['loha_A1']) * (f['loha_B2'] @ f['loha_A2']))


KERNELS = [
    nn.Conv1d(4, 6, 3, groups=2),
    nn.Conv2d(4, 6, (3, 5)),
    nn.Conv2d(6, 6, 7, groups=6),
    nn.Conv3d(4, 5, (1, 2, 3)),
    nn.ConvTranspose2d(4, 6, 3, groups=2),
]


@pytest.mark.parametrize('layer', KERNELS, ids=lambda layer: type(layer).__name__)
def test_loha_keeps_the_axes_of_a_kernel(layer):
    frozen, new, f = adapted(layer, dict(type='LoHa', rank=3, scale=0.7, layout='tucker'))
    one, two = (
        np.einsum(TUCKER[frozen.ndim], f[f'loha_T{i}'], f[f'loha_B{i}'], f[f'loha_A{i}'])
        for i in (1, 2)
    )
    close(new, frozen + 0.7 * one * two)


@pytest.mark.parametrize('layer', KERNELS, ids=lambda layer: type(layer).__name__)
def test_loha_unfolds_a_kernel_in_the_channel_layout(layer):
    frozen, new, f = adapted(layer, dict(type='LoHa', rank=2, layout='channel'))
    assert f['loha_A1'].shape == (2, prod(frozen.shape[1:]))
    delta = (f['loha_B1'] @ f['loha_A1']) * (f['loha_B2'] @ f['loha_A2'])
    close(new, frozen + delta.reshape(frozen.shape))


@pytest.mark.parametrize('rank', [1, 2, 64])
@pytest.mark.parametrize('weight, spec', weights())
def test_lohas_parameters_in_closed_form(weight, spec, rank):
    n, m, *kernel = spec.shape
    size = prod(kernel)
    r, s = min(rank, n), min(rank, m)
    flat = 2 * min(rank, n, m * size) * (n + m * size)
    kept = 2 * (r * s * size + r * n + s * m) if size > 1 else flat
    assert count(LoHa(rank=rank, layout='tucker').init(weight, spec)) == kept
    assert count(LoHa(rank=rank).init(weight, spec)) == flat


def test_loha_reaches_the_square_of_its_rank():
    layer = nn.Linear(30, 40).double()
    method = LoHa(rank=4)
    factors = init(layer, method)
    factors['loha_B2'].normal_()
    assert torch.linalg.matrix_rank(method.delta(factors, spec_of(layer))) == 16
    assert torch.linalg.matrix_rank(factors['loha_B2'] @ factors['loha_A2']) == 4


def test_loha_of_a_kernel_reaches_the_square_along_both_channel_modes():
    layer = nn.Conv2d(20, 30, 3).double()
    method = LoHa(rank=3, layout='tucker')
    factors = init(layer, method)
    factors['loha_B2'].normal_()
    delta = method.delta(factors, spec_of(layer))
    assert torch.linalg.matrix_rank(delta.flatten(1)) == 9
    assert torch.linalg.matrix_rank(delta.transpose(0, 1).flatten(1)) == 9


def test_loha_starts_as_lycoris_does():
    factors = init(nn.Conv2d(500, 400, 3), LoHa(rank=20, layout='tucker'))
    assert not factors['loha_B2'].any()
    for name, std in dict(loha_B1=0.1, loha_A1=1, loha_A2=1, loha_T1=0.1, loha_T2=0.1).items():
        assert abs(factors[name].std().item() / std - 1) < 0.05, name
        assert abs(factors[name].mean().item()) < 0.05 * std, name


def test_loha_starts_a_depthwise_kernels_number_at_1():
    factors = init(nn.Conv2d(6, 6, 3, groups=6), LoHa(rank=2, layout='tucker'))
    assert factors['loha_A1'].item() == factors['loha_A2'].item() == 1
    assert factors['loha_T1'].shape == (2, 1, 3, 3)


@pytest.mark.parametrize('factor', [-1, 1, 2, 3, 8, 16, 60])
def test_split_against_a_search(factor):
    for size in range(1, 200):
        pairs = [(a, size // a) for a in range(1, size + 1) if size % a == 0 and a * a <= size]
        if factor > 0 and size % factor == 0:
            expected = next(pair for pair in pairs if factor in pair)
        else:
            fitting = [pair for pair in pairs if factor < 0 or pair[0] <= factor]
            expected = min(fitting, key=sum)
        assert split(size, factor) == expected


def test_split_by_hand():
    assert split(127) == (1, 127) and split(128) == (8, 16) and split(256) == (16, 16)
    assert split(250, 8) == (5, 50) and split(128, 64) == (2, 64) and split(1, 4) == (1, 1)


def test_lokr_on_a_matrix():
    frozen, new, f = adapted(nn.Linear(20, 30), dict(type='LoKr', rank=1, alpha=0.5))
    assert f['lokr_C'].shape == (5, 4)
    close(new, frozen + 0.5 * np.kron(f['lokr_C'], f['lokr_B'] @ f['lokr_A']))


def test_lokr_with_both_blocks_low_rank():
    layer, config = nn.Linear(64, 81), dict(type='LoKr', rank=2, alpha=1, decompose_both=True)
    frozen, new, f = adapted(layer, config)
    first, second = f['lokr_C1'] @ f['lokr_C2'], f['lokr_B'] @ f['lokr_A']
    assert first.shape == (9, 8) and second.shape == (9, 8)
    close(new, frozen + 0.5 * np.kron(first, second))


def test_lokr_with_a_whole_block():
    frozen, new, f = adapted(nn.Linear(4, 6), dict(type='LoKr', rank=2, alpha=1))
    assert set(f) == {'lokr_C', 'lokr_block'}
    close(new, frozen + 0.5 * np.kron(f['lokr_C'], f['lokr_block']))


@pytest.mark.parametrize('layer', KERNELS, ids=lambda layer: type(layer).__name__)
def test_lokr_keeps_the_axes_of_a_kernel(layer):
    frozen, new, f = adapted(layer, dict(type='LoKr', rank=1, scale=0.7, layout='tucker'))
    block = np.einsum(TUCKER[frozen.ndim], f['lokr_T'], f['lokr_B'], f['lokr_A'])
    delta = np.empty_like(frozen)
    for position in np.ndindex(*frozen.shape[2:]):
        at = (..., *position)
        delta[at] = np.kron(f['lokr_C'], block[at])
    close(new, frozen + 0.7 * delta)


@pytest.mark.parametrize('layer', KERNELS, ids=lambda layer: type(layer).__name__)
def test_lokr_unfolds_its_block_in_the_channel_layout(layer):
    frozen, new, f = adapted(layer, dict(type='LoKr', rank=1, layout='channel'))
    block = (f['lokr_B'] @ f['lokr_A']).reshape(len(f['lokr_B']), -1, *frozen.shape[2:])
    delta = np.einsum('ac,bd...->abcd...', f['lokr_C'], block).reshape(frozen.shape)
    close(new, frozen + delta)


@pytest.mark.parametrize('decompose_both', [False, True])
@pytest.mark.parametrize('rank, factor', [(1, -1), (2, -1), (2, 1), (3, 2), (5, -1)])
@pytest.mark.parametrize('weight, spec', weights())
def test_lokrs_parameters_in_closed_form(weight, spec, rank, factor, decompose_both):
    (a, b), (c, d) = (split(size, factor) for size in spec.shape[:2])
    size = prod(spec.kernel_size)
    first = min(a * c, rank * (a + c)) if decompose_both else a * c
    r, s = min(rank, b), min(rank, d)
    kept, flat = r * s * size + r * b + s * d, rank * (b + d * size)
    whole = b * d * size
    arguments = dict(rank=rank, factor=factor, decompose_both=decompose_both)
    expected = first + min(whole, kept if size > 1 else flat)
    assert count(LoKr(**arguments, layout='tucker').init(weight, spec)) == expected
    expected = first + min(whole, flat)
    assert count(LoKr(**arguments).init(weight, spec)) == expected


def test_lokr_on_a_wide_layer_is_a_tenth_of_lora():
    layer = nn.Linear(1024, 1024)
    assert count(init(layer, LoKr(rank=8))) == 32 * 32 + 8 * (32 + 32)
    assert count(init(layer, LoKr(rank=8, decompose_both=True))) == 2 * 8 * (32 + 32)


def test_lokr_with_factor_1_is_lora_with_a_trained_scale():
    frozen, new, f = adapted(nn.Linear(6, 5), dict(type='LoKr', rank=2, factor=1))
    assert f['lokr_C'].shape == (1, 1)
    close(new, frozen + f['lokr_C'].item() * f['lokr_B'] @ f['lokr_A'])


def test_the_rank_of_lokr_is_the_product_of_its_blocks():
    layer = nn.Linear(60, 70)
    method = LoKr(rank=2)
    factors = init(layer, method)
    factors['lokr_A'].normal_()
    delta = method.delta(factors, spec_of(layer))
    assert torch.linalg.matrix_rank(delta) == torch.linalg.matrix_rank(factors['lokr_C']) * 2 == 12


@pytest.mark.parametrize(
    'layer, arguments, zero, bounds',
    [
        (
            nn.Linear(900, 1600),
            dict(decompose_both=True),
            'lokr_A',
            dict(lokr_C1=5**-0.5, lokr_C2=30**-0.5, lokr_B=5**-0.5),
        ),
        (
            nn.Conv2d(900, 1600, 3),
            dict(layout='tucker'),
            'lokr_T',
            dict(lokr_C=30**-0.5, lokr_B=5**-0.5),
        ),
        (nn.Conv2d(100, 100, 3), dict(rank=10), 'lokr_block', dict(lokr_C=10**-0.5)),
    ],
    ids=['both', 'tucker', 'whole'],
)
def test_lokr_starts_as_linear_layers_and_at_zero(layer, arguments, zero, bounds):
    factors = init(layer, LoKr(**dict(rank=5) | arguments))
    assert not factors.pop(zero).any()
    for name, bound in bounds.items():
        largest, std = factors[name].abs().max().item(), factors[name].std().item()
        assert 0.9 * bound < largest <= bound, name
        assert abs(std * 3**0.5 / bound - 1) < 0.15, name


def test_lokr_starts_single_numbers_at_1():
    factors = init(nn.Conv2d(7, 7, 3, groups=7), LoKr(rank=2, layout='tucker'))
    assert factors['lokr_C'].item() == factors['lokr_A'].item() == 1
    assert not factors['lokr_T'].any() and factors['lokr_B'].all()


@pytest.mark.parametrize('method', ['LoHa', 'LoKr'])
@pytest.mark.parametrize('layout', ['tucker', 'channel'])
def test_a_1x1_kernel_is_a_matrix(method, layout):
    method = mmpeft.METHODS.build(dict(type=method, rank=2, layout=layout))
    torch.manual_seed(1)
    kernel = init(nn.Conv2d(12, 20, 1), method)
    torch.manual_seed(1)
    matrix = init(nn.Linear(12, 20), method)
    assert {k: v.shape for k, v in kernel.items()} == {k: v.shape for k, v in matrix.items()}
    spec = spec_of(nn.Conv2d(12, 20, 1))
    randomized = {k: torch.randn_like(v) for k, v in kernel.items()}
    expected = method.delta(randomized, spec_of(nn.Linear(12, 20)))
    assert torch.equal(method.delta(randomized, spec)[..., 0, 0], expected)


@pytest.mark.parametrize('type', ['LoHa', 'LoKr'])
def test_the_scale_is_applied_once_when_merging(type):
    """LyCORIS' LoHa and LoKr square it."""
    layer = nn.Linear(12, 20).double()
    mmpeft.inject(layer, dict(type=type, rank=2, alpha=1))
    randomize(layer)
    adapter, frozen = layer.parametrizations.weight[0], layer.parametrizations.weight.original
    expected = frozen + 0.5 * adapter.method.delta(adapter.factors, adapter.spec)
    mmpeft.merge(layer)
    torch.testing.assert_close(layer.weight, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    'type, budget, rank, used',
    [
        ('LoHa', 7000, 4, 2 * (4 * 4 * 9 + 4 * 320) + 2 * 4 * 512),
        ('LoKr', 900, 5, 128 + 5 * 5 * 9 + 5 * 24 + 256 + 5 * 32),
    ],
)
def test_a_budget_gives_the_largest_rank_that_fits(type, budget, rank, used):
    model = nn.Sequential(nn.Conv2d(64, 256, 3), nn.Conv2d(256, 256, 1))
    summary = mmpeft.inject(model, dict(type=type, budget=budget, layout='tucker'))
    assert model[0].parametrizations.weight[0].method.rank == rank
    assert summary.adapters == used <= budget


@pytest.mark.parametrize(
    'arguments, message',
    [
        (dict(type='LoHa', alpha=4, scale=2), 'LoHa: alpha=4 and scale=2 say the same'),
        (dict(type='LoKr', alpha=4, scale=2), 'LoKr: alpha=4 and scale=2 say the same'),
        (dict(type='LoHa', rank=(2, 3)), r'rank=\(2, 3\) must be one integer'),
        (dict(type='LoHa', layout='loralib'), "Write one of 'channel', 'tucker'"),
        (dict(type='LoKr', factor=0), 'LoKr: factor=0 must be a positive integer'),
        (dict(type='LoKr', factor=-2), 'LoKr: factor=-2 must be a positive integer'),
        (dict(type='LoKr', factor=2.5), 'LoKr: factor=2.5 must be one integer'),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense(arguments, message):
    with pytest.raises(UsageError, match=message):
        mmpeft.METHODS.build(arguments)


@pytest.mark.parametrize('type, largest', [('LoHa', 16), ('LoKr', 5)])
def test_a_rank_that_no_weight_has_room_for(type, largest):
    with pytest.raises(UsageError, match=f'the largest possible is {largest}, at'):
        mmpeft.inject(nn.Linear(20, 16), dict(type=type, rank=17))
