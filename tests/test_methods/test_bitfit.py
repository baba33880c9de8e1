"""BitFit: shifts of biases."""

import pytest
import torch
from mmpretrain.models.utils.norm import GRN
from timm.layers.grn import GlobalResponseNorm
from torch import nn
from transformers.models.convnextv2.modeling_convnextv2 import ConvNextV2GRN

import mmpeft
from mmpeft.injection.site import adapters_of, attached
from tests.adapting import close
from tests.cases import METHODS, randomize

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


def test_bitfit_shifts_the_bias():
    layer = nn.Conv2d(3, 4, 3).double()
    mmpeft.inject(layer, METHODS['bitfit'])
    randomize(layer)
    before, shift = layer.parametrizations.bias.original, adapters_of(layer, 'bias')[0].shift
    assert not before.requires_grad and shift.requires_grad
    close(layer.bias.detach().numpy(), (before + shift).detach().numpy())


@pytest.mark.parametrize(
    'norm, names',
    [
        (GlobalResponseNorm, ['weight', 'bias']),
        (GRN, ['gamma', 'beta']),
        (ConvNextV2GRN, ['weight', 'bias']),
    ],
    ids=['timm', 'mmpretrain', 'transformers'],
)
def test_response_norms_of_all_packages_have_a_weight_and_a_bias(norm, names):
    for method, expected in ('SSF', names), ('BitFit', names[1:]):
        model = nn.Sequential(norm(6))
        nn.init.normal_(getattr(model[0], names[0]))
        mmpeft.inject(model, dict(type=method))
        assert [site.tensor for site in attached(model)] == expected
        x = torch.randn(2, 3, 5, 6)
        model(x.movedim(-1, 1) if norm is GRN else x).sum().backward()
        assert all(p.grad.any() for s in attached(model) for p in s.adapter.parameters())
