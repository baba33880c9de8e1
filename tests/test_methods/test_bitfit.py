"""BitFit: shifts of biases."""

import pytest
from torch import nn

import mmpeft
from mmpeft.injection.site import adapters_of
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
