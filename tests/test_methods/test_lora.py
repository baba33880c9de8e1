"""LoRA in both layouts."""

import numpy as np
import pytest
from torch import nn

from mmpeft.methods.lora import LoRA
from tests.adapting import adapted, close, spec_of
from tests.cases import LAYERS

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


def test_lora_on_a_matrix():
    frozen, new, f = adapted(nn.Linear(6, 5), dict(type='LoRA', rank=2, alpha=6))
    close(new, frozen + 3 * f['lora_B'] @ f['lora_A'])


@pytest.mark.parametrize('groups', [1, 2, 6])
def test_lora_on_a_kernel_in_loralibs_layout(groups):
    k, r, out = 3, 2, 6
    layer = nn.Conv2d(6, out, k, groups=groups)
    frozen, new, f = adapted(layer, dict(type='LoRA', rank=r, scale=0.5, layout='loralib'))
    assert f['lora_A'].shape == (r * k, 6 * k)
    assert f['lora_B'].shape == (out // groups * k, r * k)
    close(new, frozen + 0.5 * (f['lora_B'] @ f['lora_A']).reshape(frozen.shape))


def test_lora_on_a_kernel_in_the_channel_layout():
    frozen, new, f = adapted(
        nn.Conv2d(6, 8, (2, 3), groups=2), dict(type='LoRA', rank=2, layout='channel')
    )
    assert f['lora_A'].shape == (2, 3 * 2 * 3) and f['lora_B'].shape == (8, 2)
    expected = np.einsum('or,rikl->oikl', f['lora_B'], f['lora_A'].reshape(2, 3, 2, 3))
    close(new, frozen + expected)


@pytest.mark.parametrize(
    'name', ['conv1d', 'conv3d', 'transposed2d', 'transposed3d', 'conv2d_wide']
)
@pytest.mark.parametrize('layout', ['loralib', 'channel'])
def test_lora_fills_kernels_of_every_dimension(name, layout):
    layer = LAYERS[name].make()
    method = LoRA(rank=2, layout=layout)
    spec = spec_of(layer)
    factors = method.init(layer.weight.detach(), spec)
    assert method.delta(factors, spec).shape == layer.weight.shape
