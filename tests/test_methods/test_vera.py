"""VeRA: vectors around frozen random matrices."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.injection.site import adapters_of
from mmpeft.methods import vera
from mmpeft.methods.matrix import matrix_shape
from mmpeft.methods.vera import VeRA, random_pair
from tests.adapting import (
    IMAGES,
    LAYOUTS,
    EqualBlocks,
    adapted,
    adapter_at,
    close,
    spec_of,
    trained_steps,
    weights_in,
)
from tests.cases import KINDS, LAYERS, randomize

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


@pytest.mark.parametrize('layout', LAYOUTS)
def test_vera_is_diag_b_b_diag_d_a(layer, layout):
    config = dict(type='VeRA', rank=4, d_initial=0.3, seed=5, layout=layout)
    frozen, new, f = adapted(layer, config)
    product = np.diag(f['vera_b']) @ f['vera_B'] @ np.diag(f['vera_d']) @ f['vera_A']
    close(new, frozen + product.reshape(frozen.shape))


@pytest.mark.parametrize('name', LAYERS)
@pytest.mark.parametrize('layout', LAYOUTS)
def test_vera_trains_a_number_for_each_row_and_inner_index(name, layout):
    model = LAYERS[name].make()
    shapes = [matrix_shape(spec, 3, layout) for _, spec in weights_in(model)]
    summary = mmpeft.inject(model, dict(type='VeRA', rank=3, layout=layout), dict(kinds=KINDS))
    assert [row.adapter for row in summary.rows] == [rows + inner for rows, inner, _ in shapes]
    assert summary.adapters == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_vera_starts_with_zero_b_constant_d_and_kaiming_uniform_matrices():
    layer = nn.Linear(200, 300)
    method, spec = VeRA(rank=150, d_initial=0.2), spec_of(layer)
    factors = method.init(layer.weight.detach(), spec)
    assert not factors['vera_b'].any() and (factors['vera_d'] == 0.2).all()
    for name, fan_in in (('vera_A', 200), ('vera_B', 150)):
        values, bound = method.rebuilt(spec)[name], (6 / fan_in) ** 0.5
        assert 0.999 * bound < values.abs().max() <= bound
        assert abs(values.std().item() / (2 / fan_in) ** 0.5 - 1) < 0.01


def test_veras_update_has_one_variance_at_all_ranks():
    layer = nn.Linear(200, 300)
    spread = []
    for rank in (16, 64, 256):
        method, spec = VeRA(rank=rank), spec_of(layer)
        factors = method.init(layer.weight.detach(), spec) | method.rebuilt(spec)
        factors['vera_b'].fill_(1)
        spread.append(method.delta(factors, spec).std().item())
    np.testing.assert_allclose(spread, 0.1 * 2 / 200**0.5, rtol=0.1)


def test_veras_matrices_never_change():
    """Adapters do not hold them: other values here would spoil every file."""
    up, down = random_pair(3, 2, 4, seed=0)
    assert up.dtype == down.dtype == torch.float32
    expected = np.random.RandomState([0, 3, 2, 4]).uniform(-1, 1, 3 * 2 + 2 * 4)
    close(up.numpy(), (expected[:6] * 3**0.5).astype(np.float32).reshape(3, 2))
    close(down.numpy(), (expected[6:] * 1.5**0.5).astype(np.float32).reshape(2, 4))
    np.testing.assert_allclose(up[0].numpy(), [1.2441076, 1.5898685], rtol=1e-6)
    np.testing.assert_allclose(
        down[1].numpy(), [-0.99934399, 0.74941081, 0.04258755, -0.17029285], rtol=1e-6
    )


def test_veras_matrices_differ_by_seed_and_shape():
    first = random_pair(4, 4, 4, 0)[0]
    others = [random_pair(4, 4, 4, 1)[0], random_pair(4, 4, 5, 0)[0], random_pair(4, 4, 4, 0)[1]]
    assert not any(torch.isclose(first, other).any() for other in others)


def test_vera_shares_its_matrices_and_stores_none(tmp_path):
    model = EqualBlocks()
    plain = copy.deepcopy(model)
    mmpeft.inject(model, dict(type='VeRA', rank=4))
    pairs = [('up.0', 'up.1'), ('down.0', 'down.1'), ('depthwise.0', 'depthwise.1')]
    for holder in (model, copy.deepcopy(model)):
        for one, two in pairs:
            for name in ('vera_A', 'vera_B'):
                assert getattr(adapter_at(holder, one), name) is getattr(
                    adapter_at(holder, two), name
                )
            assert adapter_at(holder, one).vera_b is not adapter_at(holder, two).vera_b
        assert adapter_at(holder, 'up.0').vera_B is not adapter_at(holder, 'down.0').vera_B
    assert not any('vera_A' in key or 'vera_B' in key for key in model.state_dict())
    assert not any(p is adapter_at(model, 'up.0').vera_A for p in model.parameters())

    randomize(model)
    x = torch.randn(IMAGES)
    path = mmpeft.save_adapter(model, tmp_path / 'vera.safetensors')
    vera._drawn.cache_clear()
    other_seed = copy.deepcopy(plain)
    mmpeft.load_adapter(plain, path)
    assert torch.equal(plain(x), model(x))
    mmpeft.inject(other_seed, dict(type='VeRA', rank=4, seed=1))
    with pytest.raises(UsageError, match='seed=0 at .*, and the model seed=1'):
        mmpeft.load_adapter(other_seed, path)


def test_training_leaves_veras_matrices_alone():
    model = EqualBlocks()
    mmpeft.inject(model, dict(type='VeRA', rank=4))
    own = adapter_at(model, 'up.0')
    before = {name: value.clone() for name, value in own.factors.items()}
    trained_steps(model, 3)
    changed = {name for name, value in own.factors.items() if not torch.equal(value, before[name])}
    assert changed == {'vera_b', 'vera_d'}


def test_veras_matrices_are_the_same_in_every_precision():
    for dtype in (torch.float64, torch.bfloat16):
        layer = nn.Linear(6, 5).to(dtype)
        mmpeft.inject(layer, dict(type='VeRA', rank=4))
        held = adapters_of(layer, 'weight')[0].vera_A
        assert held.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.equal(held.float(), random_pair(5, 4, 6, 0)[1])


def test_a_budget_buys_vera_the_largest_rank():
    fixed = 8 + 2 * (8 + 12 + 8)
    model = EqualBlocks()
    summary = mmpeft.inject(model, dict(type='VeRA', budget=fixed + 7 * 9 + 6))
    assert model.peft[0].method.rank == 9
    assert summary.adapters == fixed + 7 * 9


def test_veras_rank_may_pass_the_width():
    layer = nn.Linear(6, 5)
    assert mmpeft.inject(layer, dict(type='VeRA', rank=12)).adapters == 5 + 12
    with pytest.raises(UsageError, match='largest possible is 12'):
        mmpeft.inject(nn.Linear(6, 5), dict(type='VeRA', rank=13))


@pytest.mark.parametrize('name', ['VeRA', 'RandLoRA'])
def test_projections_are_made_again_after_a_meta_device(name):
    """No state dict holds them."""
    method = dict(type=name, rank=2)
    model = nn.Sequential(nn.Linear(6, 5))
    mmpeft.inject(model, method)
    randomize(model)
    with torch.device('meta'):
        other = nn.Sequential(nn.Linear(6, 5))
    mmpeft.inject(other, method)
    other.to_empty(device='cpu')
    other.load_state_dict(model.state_dict())
    x = torch.randn(3, 6)
    assert torch.equal(other(x), model(x))
