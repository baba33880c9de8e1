"""RepAdapter: a 1x1 convolution before a layer, as its authors write it."""

import copy

import numpy as np
import torch
from scipy.linalg import block_diag
from torch import nn

import mmpeft
from mmpeft.injection.site import adapters_of
from tests.adapting import adapted, close, init
from tests.cases import randomize


def test_on_the_input_channels_of_each_group(layer):
    frozen, new, f = adapted(layer, dict(type='RepAdapter', rank=2, scale=0.7))
    group, groups = np.eye(f['down'].shape[1]), getattr(layer, 'groups', 1)
    group = group + 0.7 * block_diag(*f['up']) @ f['down']
    if isinstance(layer, nn.ConvTranspose2d):
        expected = np.einsum('io...,ij->jo...', frozen, np.kron(np.eye(groups), group))
    elif isinstance(layer, nn.Embedding):
        expected = group.T @ frozen
    else:
        expected = np.einsum('oi...,ij->oj...', frozen, group)
    close(new, expected)


def test_equals_a_grouped_bottleneck_before_the_layer():
    plain = nn.Sequential(nn.Conv2d(6, 5, 3, padding=1)).double()
    model = copy.deepcopy(plain)
    mmpeft.inject(model, dict(type='RepAdapter', rank=4, scale=0.5))
    randomize(model)
    f = adapters_of(model[0], 'weight')[0].factors
    down, up = nn.Conv2d(6, 4, 1, bias=False), nn.Conv2d(4, 6, 1, groups=2, bias=False)
    down.weight.data, up.weight.data = f['down'][..., None, None], f['up'].view(6, 2, 1, 1)
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(model(x), plain(x + 0.5 * up(down(x))), rtol=1e-12, atol=1e-12)


def test_start_and_size():
    f = init(nn.Linear(48, 30), mmpeft.METHODS.build(dict(type='RepAdapter', rank=8)))
    assert 0.9 * (6 / 56) ** 0.5 < f['down'].abs().max() <= (6 / 56) ** 0.5
    assert f['up'].shape == (2, 24, 4) and not f['up'].any()
    f = init(nn.Conv2d(6, 6, 3, groups=6), mmpeft.METHODS.build(dict(type='RepAdapter')))
    assert f['up'].shape == (1, 1, 1)
