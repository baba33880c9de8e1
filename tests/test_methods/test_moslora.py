"""MoSLoRA: a mixer between two factors."""

import numpy as np
import pytest
import torch
from torch import nn

from mmpeft.methods.lora import LoRA
from mmpeft.methods.moslora import MoSLoRA
from tests.adapting import LAYOUTS, adapted, close, spec_of, weights_of_all_layers

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


@pytest.mark.parametrize('layout', LAYOUTS)
def test_moslora_is_b_m_a(layer, layout):
    frozen, new, f = adapted(layer, dict(type='MoSLoRA', rank=2, scale=0.5, layout=layout))
    product = np.einsum('ip,pq,qj->ij', f['lora_B'], f['mixer'], f['lora_A'])
    close(new, frozen + 0.5 * product.reshape(frozen.shape))


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('mixer_init', ['kaiming', 'orthogonal'])
def test_moslora_adds_a_square_mixer_to_lora(layout, mixer_init):
    for weight, spec in weights_of_all_layers():
        lora = LoRA(rank=3, layout=layout).init(weight, spec)
        factors = MoSLoRA(rank=3, layout=layout, mixer_init=mixer_init).init(weight, spec)
        inner = len(lora['lora_A'])
        assert factors['mixer'].shape == (inner, inner)
        assert {k: v.shape for k, v in factors.items() if k != 'mixer'} == {
            k: v.shape for k, v in lora.items()
        }


def test_moslora_starts_with_a_zero_b_and_a_mixer_of_choice():
    layer = nn.Linear(400, 300).double()
    weight, spec = layer.weight.detach(), spec_of(layer)
    for mixer_init in ('kaiming', 'orthogonal'):
        factors = MoSLoRA(rank=100, mixer_init=mixer_init).init(weight, spec)
        assert not factors['lora_B'].any()
        assert 0.99 / 20 < factors['lora_A'].abs().max() <= 1 / 20
        mixer = factors['mixer'].numpy()
        if mixer_init == 'kaiming':
            assert 0.99 / 10 < np.abs(mixer).max() <= 1 / 10
            assert abs(mixer.std() * 10 * 3**0.5 - 1) < 0.03
        else:
            close(mixer @ mixer.T, np.eye(100))
            assert np.abs(mixer - np.eye(100)).max() > 0.1


def test_moslora_with_an_identity_mixer_is_lora():
    layer = nn.Conv2d(4, 6, 3)
    weight, spec = layer.weight.detach(), spec_of(layer)
    lora, mosl = LoRA(rank=2, layout='loralib'), MoSLoRA(rank=2, layout='loralib')
    factors = lora.init(weight, spec)
    factors['lora_B'].normal_()
    mixed = mosl.delta(factors | {'mixer': torch.eye(6)}, spec)
    torch.testing.assert_close(mixed, lora.delta(factors, spec))
