"""FacT: cores between factors that all layers share, pieces of wide layers included."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.injection.site import adapters_of
from tests.adapting import adapted, close
from tests.cases import randomize

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')
LAYERS = dict(
    square=(lambda: nn.Linear(4, 4), (1, 1)),
    rows=(lambda: nn.Linear(4, 12), (3, 1)),
    columns=(lambda: nn.Linear(16, 4), (1, 4)),
    kernel=(lambda: nn.Conv2d(3, 6, (2, 3)), (2, 1)),
    uneven=(lambda: nn.Conv2d(4, 6, 1), (1, 1)),
)


@pytest.mark.parametrize('form', ['tt', 'tk'])
@pytest.mark.parametrize('name', LAYERS)
def test_fact_by_its_formula(name, form):
    make, (rows, columns) = LAYERS[name]
    frozen, new, f = adapted(make(), dict(type='FacT', rank=2, form=form, scale=0.3))
    left, right = f['left'], f['right']
    if form == 'tt':
        cores = f['cores'].reshape(rows * columns, 2, 2, *frozen.shape[2:])
    else:
        cores = np.einsum('rsc,pc...->prs...', f['core'], f['own'])
    assert len(cores) == rows * columns
    parts = [np.einsum('ir,rs...,js->ij...', left, core, right) for core in cores]
    close(new, frozen + 0.3 * np.concatenate(parts, axis=0 if rows > 1 else 1))


@pytest.mark.parametrize('form', ['tt', 'tk'])
def test_layers_of_one_width_share_all_but_their_cores(form, tmp_path):
    def make():
        return nn.ModuleList([nn.Linear(4, 12), nn.Linear(4, 4), nn.Linear(16, 4), nn.Linear(5, 5)])

    model, plain = make(), make()
    plain.load_state_dict(model.state_dict())
    summary = mmpeft.inject(model, dict(type='FacT', rank=2, form=form))
    own = 8 * 4 + 4 if form == 'tt' else 8 * 2 + 2 + 2 * 8  # the last has a width of its own
    assert summary.adapters == own + 2 * 4 * 2 + 2 * 5 * 2
    factors = [adapters_of(layer, 'weight')[0].factors for layer in model]
    for name in adapters_of(model[0], 'weight')[0].method.tied:
        assert factors[0][name] is factors[1][name] is factors[2][name]
        assert factors[0][name] is not factors[3][name]
    randomize(model)
    mmpeft.load_adapter(plain, mmpeft.save_adapter(model, tmp_path / 'fact.safetensors'))
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(plain, model, strict=True))


def test_the_right_factor_alone_starts_at_zero():
    for form in ('tt', 'tk'):
        layer = nn.Linear(8, 24)
        mmpeft.inject(layer, dict(type='FacT', rank=3, form=form))
        for name, value in adapters_of(layer, 'weight')[0].factors.items():
            assert bool(value.any()) == (name != 'right')


def test_without_pieces_it_is_lotr():
    one = nn.Conv2d(6, 5, 3).double()
    two = copy.deepcopy(one)
    mmpeft.inject(one, dict(type='FacT', rank=2))
    mmpeft.inject(two, dict(type='LoTR', rank=2))
    randomize(one)
    f, g = (adapters_of(layer, 'weight')[0].factors for layer in (one, two))
    with torch.no_grad():
        g['lotr_A'].copy_(f['left']), g['lotr_B'].copy_(f['right'])
        g['core'].copy_(f['cores'].view_as(g['core']))
    torch.testing.assert_close(one.weight, two.weight, rtol=1e-12, atol=1e-12)


def test_a_model_with_it_takes_a_memory_format():
    model = nn.Sequential(nn.Conv2d(4, 6, 3)).double()
    mmpeft.inject(model, dict(type='FacT', rank=2))
    x = torch.randn(1, 4, 5, 5).double()
    torch.testing.assert_close(model.to(memory_format=torch.channels_last)(x), model(x))
