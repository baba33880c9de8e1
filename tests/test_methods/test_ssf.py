"""SSF: a scale and shift behind linear layers, convolutions and norms."""

import copy

import numpy as np
import torch
from torch import nn

import mmpeft
from mmpeft.injection.site import adapters_of
from tests.adapting import close
from tests.cases import randomize


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 4, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.ConvTranspose2d(4, 6, 2, groups=2),
            nn.Flatten(2),
            nn.LayerNorm(16),
            nn.Linear(16, 5),
        )


def test_each_output_is_scaled_and_shifted():
    plain, x = Net().double().eval(), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        plain[1].bias.normal_(), plain[4].bias.normal_()
    model = copy.deepcopy(plain)
    summary = mmpeft.inject(model, dict(type='SSF'))
    assert summary.adapters == 4 + 2 * (4 + 6 + 16 + 5)
    randomize(model)
    y = x
    for layer, own in zip(plain, model, strict=True):
        y = layer(y)
        if not adapters_of(own, 'weight'):
            continue
        axis = -1 if isinstance(layer, nn.Linear | nn.LayerNorm) else 1
        shape = [1] * y.ndim
        shape[axis] = -1
        y = y * (1 + adapters_of(own, 'weight')[0].scale.view(shape))
        if layer.bias is not None:
            y = y + adapters_of(own, 'bias')[0].shift.view(shape)
    close(model(x).detach().numpy(), y.detach().numpy())


def test_a_weight_shares_its_scale_with_its_own_bias_alone(tmp_path):
    plain = nn.ModuleDict(
        dict(a=nn.Linear(4, 4), b=nn.Linear(4, 4), attn=nn.MultiheadAttention(4, 1, kdim=4, vdim=2))
    )
    model = copy.deepcopy(plain)
    mmpeft.inject(model, dict(type='SSF'))
    a, b = (adapters_of(model[name], 'weight')[0].scale for name in 'ab')
    assert a is adapters_of(model['a'], 'bias')[0].scale and a is not b
    names = 'q_proj_weight', 'k_proj_weight', 'v_proj_weight', 'in_proj_bias'
    scales = {id(adapters_of(model['attn'], name)[0].scale) for name in names}
    assert len(scales) == 4
    randomize(model)
    path = mmpeft.save_adapter(model, tmp_path / 'ssf.safetensors')
    mmpeft.load_adapter(plain, path)
    assert adapters_of(plain['a'], 'weight')[0].scale is adapters_of(plain['a'], 'bias')[0].scale
    np.testing.assert_array_equal(plain['a'].bias.detach(), model['a'].bias.detach())
