"""Figures of updates against numpy, from merged weights; and what has no update."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.analysis.kernels import as_image, draw_kernels
from mmpeft.analysis.updates import (
    adapted_weights,
    cosines,
    figures,
    means,
    update_of,
    updates,
    without_updates,
)
from mmpeft.errors import UsageError
from mmpeft.methods import ActivationMethod
from mmpeft.quantization import dequantized
from tests.cases import FAMILIES, KINDS, METHODS, randomize
from tests.networks import Tied

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')
mmpeft.METHODS.import_from_location()


class Layers(nn.Module):
    """Weights of all kinds."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(40, 9)
        self.attn = nn.MultiheadAttention(8, 2)
        self.conv = nn.Conv2d(14, 12, 3)
        self.depthwise = nn.Conv2d(12, 12, 7, groups=12)
        self.up = nn.ConvTranspose2d(12, 6, 3, groups=2)
        self.embed = nn.Embedding(20, 13, padding_idx=2)


def adapted(method, seed=0, base=None):
    torch.manual_seed(9)
    model = base or Layers().double()
    mmpeft.inject(model, method, dict(kinds=None if method['type'] == 'BitFit' else KINDS))
    torch.manual_seed(seed)
    randomize(model, 0.1)
    return model


def merged_updates(model):
    """W and dW of all weights that merging changes, as numpy."""
    after = mmpeft.merge(copy.deepcopy(model)).state_dict()
    before = mmpeft.remove(copy.deepcopy(model)).state_dict()
    pairs = {name: (w.numpy(), after[name].numpy() - w.numpy()) for name, w in before.items()}
    return {name: pair for name, pair in pairs.items() if pair[1].any()}


def expected(weight, delta):
    """By projectors, the pseudoinverse in place of singular vectors."""
    w, d = (x.reshape(len(x), -1) for x in (weight, delta))
    inverse = np.linalg.pinv(d, rcond=1e-10)
    s = np.linalg.svd(d, compute_uv=False)
    p = s[s > 1e-10 * s[0]] / s[s > 1e-10 * s[0]].sum()
    norm = np.sqrt((d**2).sum())
    with np.errstate(divide='ignore'):  # a bias of zeros
        relative = norm / np.sqrt((w**2).sum())
        amplification = norm / np.sqrt(((d @ inverse @ w @ inverse @ d) ** 2).sum())
    relative, amplification = (x if np.isfinite(x) else np.nan for x in (relative, amplification))
    rank = np.prod(p**-p)
    return dict(norm=norm, relative=relative, amplification=amplification, effective_rank=rank)


WEIGHTS = [
    name
    for name in (*FAMILIES, 'lora_mpc_o', 'lotr', 'flora_lie', 'flora_modes', 'loha', 'oft')
    if mmpeft.METHODS.get(METHODS[name]['type']).adapts
    and not issubclass(mmpeft.METHODS.get(METHODS[name]['type']), ActivationMethod)
]


@pytest.mark.parametrize('method', WEIGHTS)
def test_figures(method):
    model = adapted(METHODS[method])
    found, pairs = figures(updates(model)), merged_updates(model)
    assert {row.name for row in found} == pairs.keys()
    total = sum((delta**2).sum() for _, delta in pairs.values())
    for row in found:
        weight, delta = pairs[row.name]
        assert row.shape == weight.shape
        for name, value in expected(weight, delta).items():
            given = getattr(row, name)
            assert given == pytest.approx(value, rel=1e-7, nan_ok=True), (row.name, name)
        assert row.share == pytest.approx((delta**2).sum() / total, rel=1e-9)
    for name, value in means(found).items():
        own = np.nanmean([getattr(row, name) for row in found])
        assert value == pytest.approx(own, rel=1e-12)


def test_thin_updates_are_decomposed_by_their_factors():
    thin = {update.name for update in updates(adapted(METHODS['flora'])) if update.factors}
    assert thin == {'wide.weight', 'attn.in_proj_weight', 'attn.out_proj.weight', 'conv.weight'}
    assert not any(update.factors for update in updates(adapted(METHODS['dora'])))


def test_figures_that_are_known():
    """W = diag(3, 4, 5, 6); dW = 2 (e1 e1' + e2 e3'), of two equal singular values."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(torch.tensor([3.0, 4.0, 5.0, 6.0])))
    mmpeft.inject(model, dict(type='LoRA', rank=2))
    (row,) = figures(updates(model))
    assert (row.norm, row.amplification, row.effective_rank, row.share) == (0, 0, 0, 0)
    adapter = model[0].parametrizations.weight[0]
    with torch.no_grad():
        adapter.lora_B.copy_(2 * torch.eye(4)[:, :2])
        adapter.lora_A.copy_(torch.eye(4)[[0, 2]])
    (row,) = figures(updates(model))
    assert row.norm == pytest.approx(8**0.5) and row.effective_rank == pytest.approx(2)
    assert row.amplification == pytest.approx(8**0.5 / 3)  # of W it has W11 and W23 = 0
    assert row.share == 1 and row.relative == pytest.approx((8 / 86) ** 0.5)


def test_what_rounding_leaves_has_no_rank():
    """DoRA's magnitudes are norms in float32, and its update before a step is not quite zero."""
    (row,) = figures(updates(adapted_linear(METHODS['dora'])))
    assert 0 < row.norm < 1e-6 and row.effective_rank == row.amplification == 0
    (row,) = figures(updates(adapted_linear(METHODS['dora'], 1e-4)))
    assert row.effective_rank > 1 and row.amplification > 0


def adapted_linear(method, std=0.0):
    model = nn.Sequential(nn.Linear(384, 96))
    mmpeft.inject(model, method)
    adapter = model[0].parametrizations.weight[0]
    with torch.no_grad():
        adapter.lora_B.normal_(0, std)
    return model


def test_several_adapters_of_a_weight_are_one_update():
    model = adapted(METHODS['flora'])
    mmpeft.inject(model, METHODS['dora'], dict(kinds=KINDS))
    randomize(model, 0.1)
    pairs = merged_updates(model)
    found = {update.name: update.delta.numpy() for update in updates(model)}
    assert found.keys() == pairs.keys()
    for name, (_, delta) in pairs.items():
        np.testing.assert_allclose(found[name], delta, rtol=0, atol=1e-14)


def test_a_tied_weight_counts_once():
    model = Tied()
    mmpeft.inject(model, dict(type='LoRA', rank=2), dict(kinds=KINDS, include=('embed', 'out')))
    randomize(model)
    assert [row.name for row in figures(updates(model))] == ['embed.weight']


@pytest.mark.parametrize('method', ['flora', 'liera'])
def test_weights_in_few_bits(method):
    """The update is one of the values that they stand for."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 128))
    plain = copy.deepcopy(model)
    mmpeft.inject(model, METHODS[method], frozen_dtype='nf4')
    with torch.no_grad():
        for layer, twin in zip(model, plain, strict=True):
            twin.weight.copy_(dequantized(layer.parametrizations.weight.original))
    mmpeft.inject(plain, METHODS[method])
    randomize(model)
    for layer, twin in zip(model, plain, strict=True):
        own = layer.parametrizations.weight[0].state_dict()
        twin.parametrizations.weight[0].load_state_dict(own)
    assert figures(updates(model)) == figures(updates(plain))


def test_a_linear_layer_that_stores_the_transpose():
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(6, 9).double())
    mmpeft.inject(model, METHODS['liera'])
    randomize(model)
    ((weight, delta),) = merged_updates(model).values()
    (row,) = figures(updates(model))
    assert row.shape == (6, 9)
    for name, value in expected(weight.T, delta.T).items():
        assert getattr(row, name) == pytest.approx(value, rel=1e-9)


def test_cosines():
    one, other = adapted(METHODS['flora'], 1), adapted(METHODS['liera'], 2)
    found, pairs = cosines(one, other), [merged_updates(model) for model in (one, other)]
    ours, theirs = ({n: d.ravel() for n, (_, d) in each.items()} for each in pairs)
    assert found.keys() == {*ours, 'all'}
    ours['all'], theirs['all'] = (np.concatenate([*each.values()]) for each in (ours, theirs))
    for name, value in found.items():
        a, b = ours[name], theirs[name]
        assert value == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-12)
    assert cosines(one, one)['all'] == pytest.approx(1, abs=1e-12)


def test_cosines_of_weights_in_common_alone():
    one, other = adapted(METHODS['flora'], 1), nn.Sequential(nn.Linear(3, 3))
    mmpeft.inject(other, METHODS['lora'])
    with pytest.raises(UsageError, match='no weight in common'):
        cosines(one, other)
    other = Layers().double()
    mmpeft.inject(other, METHODS['lora'], dict(include=('wide',)))
    with pytest.raises(UsageError, match=r'wide\.weight is not the same weight'):
        cosines(one, other)
    other = adapted(METHODS['bitfit'])
    mmpeft.inject(other, METHODS['lora'], dict(include=('wide',)))
    assert set(cosines(other, one)) == {'wide.weight', 'all'}
    assert np.isnan(cosines(other, one)['all'])  # lora is at its start


def test_what_has_no_update():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(UsageError, match='has no adapters'):
        updates(model)
    mmpeft.inject(model, METHODS['parallel'])
    assert without_updates(model) == dict(ParallelAdapter=2)
    with pytest.raises(UsageError, match='ParallelAdapter changes activations'):
        updates(model)
    mmpeft.inject(model, METHODS['lora'])
    assert len(figures(updates(model))) == without_updates(model)['ParallelAdapter'] == 2


@pytest.mark.parametrize('name, columns', [('depthwise', 5), ('conv', 3)])
def test_pictures_show_the_kernels_of_the_largest_updates(name, columns):
    model = adapted(METHODS['flora'])
    update = update_of(adapted_weights(model)[f'{name}.weight'])
    figure = draw_kernels(update, columns)
    weight, delta = update.weight.numpy(), update.delta.numpy()
    norms = np.sort((delta**2).sum((2, 3)).ravel())
    shown = np.array([ax for ax in figure.axes if ax.images]).reshape(3, columns)
    assert len(figure.axes) == 3 * columns + 2  # and colour bars
    drawn = 0
    for before, after, change in shown.T:
        place = tuple(map(int, before.get_title().split(','))) + (0,)
        for ax, values in ((before, weight), (after, weight + delta), (change, delta)):
            np.testing.assert_array_equal(ax.images[0].get_array(), values[place[:2]])
            assert ax.images[0].get_clim()[1] >= abs(values[place[:2]]).max()
        drawn += (delta[place[:2]] ** 2).sum()
    assert drawn == pytest.approx(norms[-columns:].sum())
    image = as_image(figure)
    assert image.dtype == np.uint8 and image.shape[2] == 3 and image.std() > 0
    assert before.images[0].get_clim() == after.images[0].get_clim() != change.images[0].get_clim()


def test_a_weight_without_a_kernel_is_not_drawn():
    model = adapted(METHODS['flora'])
    with pytest.raises(UsageError, match=r'wide\.weight has the shape \(9, 40\)'):
        draw_kernels(update_of(adapted_weights(model)['wide.weight']))
