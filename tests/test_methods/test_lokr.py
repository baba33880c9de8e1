"""LoKr: Kronecker products of low-rank blocks."""

from math import prod

import numpy as np
import pytest
import torch
from torch import nn

from mmpeft.methods.lokr import LoKr, split
from tests.adapting import adapted, close, count, init, spec_of, weights_in
from tests.cases import LAYERS

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


TUCKER = {3: 'abk,ia,bj->ijk', 4: 'abkl,ia,bj->ijkl', 5: 'abklm,ia,bj->ijklm'}


KERNELS = dict(
    conv1d=lambda: nn.Conv1d(4, 6, 3, groups=2),
    conv2d=lambda: nn.Conv2d(4, 6, (3, 5)),
    depthwise=lambda: nn.Conv2d(6, 6, 7, groups=6),
    conv3d=lambda: nn.Conv3d(4, 5, (1, 2, 3)),
    transposed=lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
)


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


@pytest.mark.parametrize('name', KERNELS)
def test_lokr_keeps_the_axes_of_a_kernel(name):
    frozen, new, f = adapted(KERNELS[name](), dict(type='LoKr', rank=1, scale=0.7, layout='tucker'))
    block = np.einsum(TUCKER[frozen.ndim], f['lokr_T'], f['lokr_B'], f['lokr_A'])
    delta = np.empty_like(frozen)
    for position in np.ndindex(*frozen.shape[2:]):
        at = (..., *position)
        delta[at] = np.kron(f['lokr_C'], block[at])
    close(new, frozen + 0.7 * delta)


@pytest.mark.parametrize('name', KERNELS)
def test_lokr_unfolds_its_block_in_the_channel_layout(name):
    frozen, new, f = adapted(KERNELS[name](), dict(type='LoKr', rank=1, layout='channel'))
    block = (f['lokr_B'] @ f['lokr_A']).reshape(len(f['lokr_B']), -1, *frozen.shape[2:])
    delta = np.einsum('ac,bd...->abcd...', f['lokr_C'], block).reshape(frozen.shape)
    close(new, frozen + delta)


@pytest.mark.parametrize('decompose_both', [False, True])
@pytest.mark.parametrize('rank, factor', [(1, -1), (2, -1), (2, 1), (3, 2), (5, -1)])
def test_lokrs_parameters_in_closed_form(rank, factor, decompose_both):
    arguments = dict(rank=rank, factor=factor, decompose_both=decompose_both)
    for case in LAYERS.values():
        for weight, spec in weights_in(case.build()):
            (a, b), (c, d) = (split(size, factor) for size in spec.shape[:2])
            size = prod(spec.kernel_size)
            first = min(a * c, rank * (a + c)) if decompose_both else a * c
            r, s = min(rank, b), min(rank, d)
            kept, flat = r * s * size + r * b + s * d, rank * (b + d * size)
            whole = b * d * size
            expected = first + min(whole, kept if size > 1 else flat)
            assert count(LoKr(**arguments, layout='tucker').init(weight, spec)) == expected, spec
            expected = first + min(whole, flat)
            assert count(LoKr(**arguments).init(weight, spec)) == expected, spec


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
            'lokr_A',
            dict(lokr_C=30**-0.5, lokr_B=40**-0.5, lokr_T=45**-0.5),
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
    assert factors['lokr_C'].item() == 1 and not factors['lokr_A'].any()
    assert factors['lokr_T'].all() and factors['lokr_B'].all()
