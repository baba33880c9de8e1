"""What the contract says to those who write a method of their own."""

import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.methods import Card, Method
from mmpeft.methods.base import register

CARD = dict(family='extension', formula='W + dW', suits='Tests.')


@pytest.fixture
def method(request):
    """A registered method whose ``init`` returns what a function of the weight does."""

    def make(init):
        class Mine(Method):
            card = Card(**CARD)

            def init(self, weight, spec):
                return init(weight)

            def apply(self, weight, factors, spec, training=False):
                return weight + factors['mine'] - factors['mine'].detach()

        request.addfinalizer(lambda: mmpeft.METHODS.module_dict.pop('Mine'))
        return register(Mine)()

    return make


def test_a_method_has_a_card_of_a_known_family():
    with pytest.raises(TypeError, match='Bare has no card'):
        register(type('Bare', (Method,), {}))
    assert 'Bare' not in mmpeft.METHODS.module_dict
    with pytest.raises(UsageError, match="family='other' must be one of ends, reconstruction, ext"):
        Card(**CARD | dict(family='other'))


def test_a_method_is_registered():
    class Unknown(Method):
        pass

    with pytest.raises(UsageError, match='Unknown is not registered.*Write @mmpeft'):
        mmpeft.inject(nn.Linear(2, 2), Unknown())


@pytest.mark.parametrize(
    'init, message',
    [
        (lambda w: w.new_zeros(2), 'Mine.init returned a Tensor, not tensors by name'),
        (lambda w: {'shapes': w.new_zeros(2)}, "adapters have an attribute 'shapes'"),
        (lambda w: {'forward': w.new_zeros(2)}, "adapters have an attribute 'forward'"),
        (lambda w: {'mine': torch.arange(2)}, "'mine' is torch.int64. Fixed tensors are nn.Buffer"),
    ],
)
def test_what_init_returns_is_checked(method, init, message):
    with pytest.raises(TypeError, match=message):
        mmpeft.inject(nn.Linear(2, 2), method(init))


@pytest.mark.parametrize('of', [lambda w: w, lambda w: w[:1]], ids=['weight', 'view'])
def test_a_factor_that_is_the_weight_is_a_copy(method, of):
    layer = nn.Linear(2, 2)
    frozen = layer.weight.detach().clone()
    mmpeft.inject(layer, method(lambda weight: {'mine': of(weight)}))
    with torch.no_grad():
        for parameter in mmpeft.injection.site.adapter_parameters(layer):
            parameter.add_(1)
    assert torch.equal(mmpeft.remove(layer).weight, frozen)
