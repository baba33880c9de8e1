"""IA3, SSL and SSB: scales of channels."""

import numpy as np
import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.injection.site import adapters_of, attached
from mmpeft.injection.weights import weights_of
from mmpeft.methods.channels import per_input
from tests.cases import KINDS, LAYERS, randomize

CONVOLUTIONS = [
    name for name in LAYERS if name not in ('linear', 'embedding') and 'attention' not in name
]
METHODS = ('IA3', 'SSL', 'SSB')


def adapted(layer, method):
    """The layer after training, as it were, and its scales of output and input channels."""
    mmpeft.inject(layer, dict(type=method), dict(kinds=KINDS))
    randomize(layer)
    factors = adapters_of(layer, 'weight')[0].factors
    spec = dict(weights_of(layer))['weight']
    out = 1 + factors.get('shift_out', torch.zeros(spec.out_features)).detach().double()
    into = 1 + factors.get('shift_in', torch.zeros(spec.in_features)).detach().double()
    return layer, out, into


def channels(layer, index):
    """Output and input channel of an element of a stored weight, by torch's documentation."""
    first, second = index[:2]
    if isinstance(layer, nn.Embedding):
        return second, first
    groups = getattr(layer, 'groups', 1)
    group = first // (len(layer.weight) // groups)
    apart = group * layer.weight.shape[1] + second
    return (apart, first) if getattr(layer, 'transposed', False) else (first, apart)


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('name', ['linear', 'embedding', *CONVOLUTIONS])
def test_each_element_is_scaled_by_its_channels(name, method):
    layer = nn.Embedding(7, 6) if name == 'embedding' else LAYERS[name].make()
    layer, out, into = adapted(layer.double(), method)
    frozen = layer.parametrizations.weight.original.detach().numpy()
    expected = np.empty_like(frozen)
    for index in np.ndindex(*frozen.shape):
        o, i = channels(layer, index)
        expected[index] = out[o].item() * frozen[index] * into[i].item()
    np.testing.assert_allclose(layer.weight.detach().numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('name', ['linear', *CONVOLUTIONS])
def test_scaling_weights_is_scaling_activations(name, method):
    plain, x = LAYERS[name].make().double(), LAYERS[name].input()
    nn.init.zeros_(plain.bias)
    layer, out, into = adapted(LAYERS[name].make().double(), method)
    layer.load_state_dict(
        {'parametrizations.weight.original': plain.weight, 'bias': plain.bias}, strict=False
    )
    shape = [1] * x.ndim
    shape[-1 if name == 'linear' else 1] = -1
    expected = out.view(shape) * plain(x * into.view(shape))
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('name', LAYERS)
def test_parameters_in_closed_form(name):
    counts = {}
    for method in METHODS:
        model = LAYERS[name].build()
        counts[method] = mmpeft.inject(model, dict(type=method), dict(kinds=KINDS)).adapters
        specs = [a.spec for a in attached(model)]
        for site in attached(model):
            for value in site.adapter.factors.values():
                assert not value.any()
    assert counts['IA3'] == sum(spec.out_features for spec in specs)
    assert counts['SSL'] == sum(spec.in_features for spec in specs)
    assert counts['SSB'] == counts['IA3'] + counts['SSL']


def test_a_depthwise_kernel_has_one_scale_a_channel():
    layer = nn.Conv2d(6, 6, 7, groups=6)
    spec = dict(weights_of(layer))['weight']
    assert torch.equal(per_input(torch.arange(6), spec).flatten(), torch.arange(6))


def test_weight_decay_draws_to_the_pretrained_weight():
    layer, *_ = adapted(nn.Linear(6, 5).double(), 'SSB')
    optimizer = torch.optim.AdamW(
        [p for p in layer.parameters() if p.requires_grad], lr=0.1, weight_decay=5
    )
    for _ in range(60):
        optimizer.zero_grad()
        (0 * layer.weight.sum()).backward()
        optimizer.step()
    torch.testing.assert_close(
        layer.weight, layer.parametrizations.weight.original, rtol=1e-10, atol=1e-10
    )
