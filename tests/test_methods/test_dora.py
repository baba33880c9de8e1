"""DoRA: the direction of a weight, its magnitude apart."""

import numpy as np
import pytest
import torch
from torch import nn

from mmpeft.methods.dora import DoRA
from tests.adapting import adapted, close, spec_of
from tests.cases import LAYERS

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


@pytest.mark.parametrize('update', ['additive', 'lie', 'lie_exact'])
def test_dora_on_a_matrix(update):
    config = dict(type='DoRA', rank=2, scale=1.5, update=update)
    frozen, new, f = adapted(nn.Linear(6, 5), config)
    delta = 1.5 * f['lora_B'] @ f['lora_A']
    v = dict(additive=frozen + delta, lie=frozen * (1 + delta), lie_exact=frozen * np.exp(delta))[
        update
    ]
    close(new, f['magnitude'][:, None] * v / np.linalg.norm(v, axis=1, keepdims=True))


def test_doras_magnitude_starts_at_the_norm_of_the_pretrained_weight():
    layer = nn.Conv2d(4, 6, 3).double()
    factors = DoRA(rank=2).init(layer.weight.detach(), spec_of(layer))
    expected = np.linalg.norm(layer.weight.detach().numpy().reshape(6, -1), axis=1)
    close(factors['magnitude'].numpy(), expected)


@pytest.mark.parametrize('name', ['depthwise_multiplied', 'transposed2d', 'transposed1d', 'conv3d'])
def test_doras_norms_belong_to_output_channels(name):
    """The weights of an output channel are those that an impulse at the input finds."""
    layer = LAYERS[name].make().double()
    factors = DoRA(rank=1).init(layer.weight.detach(), spec_of(layer))
    nn.init.zeros_(layer.bias)
    weights = [[] for _ in range(layer.out_channels)]
    size = (1,) * (layer.weight.ndim - 2)
    if not layer.transposed:
        size = tuple(
            layer.dilation[i] * (layer.weight.shape[2 + i] - 1) + 1 for i in range(len(size))
        )
    for channel in range(layer.in_channels):
        for position in np.ndindex(*size):
            impulse = torch.zeros(1, layer.in_channels, *size, dtype=torch.float64)
            impulse[(0, channel, *position)] = 1
            response = layer(impulse).detach().numpy()[0]
            for out in range(layer.out_channels):
                weights[out].extend(response[out].ravel())
    expected = [np.linalg.norm(w) for w in weights]
    close(factors['magnitude'].numpy(), expected)


def test_dora_with_a_detached_norm_has_the_papers_gradient():
    layer = nn.Linear(6, 5).double()
    method, spec = DoRA(rank=2, detach_norm=True), spec_of(layer)
    weight = layer.weight.detach()
    factors = {k: v.requires_grad_() for k, v in method.init(weight, spec).items()}
    with torch.no_grad():
        factors['lora_B'].normal_()
    upstream = torch.randn_like(weight)
    (method.apply(weight, factors, spec) * upstream).sum().backward()
    v = weight + factors['lora_B'] @ factors['lora_A']
    ratio = (factors['magnitude'] / v.norm(dim=1)).detach()[:, None]
    torch.testing.assert_close(
        factors['lora_B'].grad, (ratio * upstream) @ factors['lora_A'].T, rtol=1e-12, atol=1e-12
    )
