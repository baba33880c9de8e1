"""Products of maps are computed again: squeeze and excitation, and gated MLPs."""

import pytest
import torch
from mmdet.models.layers import SELayer
from mmpretrain.models.utils import SELayer as SELayerOfMMPretrain
from mmpretrain.models.utils import SwiGLUFFN
from mmseg.models.utils import SELayer as SELayerOfMMSeg
from timm.layers import EffectiveSEModule, GluMlp, SEModule, SwiGLU
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import nn
from torchvision.ops.misc import SqueezeExcitation
from transformers import Dinov2Config, LlamaConfig
from transformers.models.dinov2.modeling_dinov2 import Dinov2SwiGLUFFN
from transformers.models.llama.modeling_llama import LlamaMLP

import mmpeft
from mmpeft.execution.gated import Gated, gated
from tests.cases import METHODS, randomize
from tests.comparing import assert_as_plain, assert_equal, plain, second_derivatives
from tests.test_execution.test_recompute import kept_bytes

GATES = dict(
    timm=lambda: SEModule(64),
    timm_max=lambda: SEModule(64, add_maxpool=True),
    timm_effective=lambda: EffectiveSEModule(64),
    timm_efficientnet=lambda: SqueezeExcite(64),
    torchvision=lambda: SqueezeExcitation(64, 4),
    mmdet=lambda: SELayer(64, ratio=8),
    mmpretrain=lambda: SELayerOfMMPretrain(64, ratio=8),
    mmseg=lambda: SELayerOfMMSeg(64, ratio=8),
)


HIDDEN = 96
DINO = Dinov2Config(hidden_size=32, mlp_ratio=4.5, use_swiglu_ffn=True)
MLPS = dict(
    timm=lambda: GluMlp(32, 2 * HIDDEN, act_layer=nn.SiLU, gate_last=False),
    timm_swiglu=lambda: SwiGLU(32, HIDDEN),
    mmpretrain=lambda: SwiGLUFFN(32, HIDDEN, add_identity=False),
    dinov2=lambda: Dinov2SwiGLUFFN(DINO),
    llama=lambda: LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=HIDDEN)),
)


@pytest.mark.parametrize('build', MLPS.values(), ids=MLPS)
def test_a_gated_mlp_keeps_its_factors_alone(build):
    kept, x = {}, torch.randn(2, 50, 32, dtype=torch.float64)
    for way in ('auto', 'plain'):
        torch.manual_seed(0)
        model = nn.Sequential(nn.LayerNorm(32), build()).double()
        mmpeft.inject(model, dict(type='FLoRA', rank=2), execution=way)
        randomize(model)
        assert_as_plain(model.train(), x)
        found = second_derivatives(model, x)
        with plain(model):
            assert_equal(found, second_derivatives(model, x), 1e-10)
        _, kept[way] = kept_bytes(model, x.clone().requires_grad_())
    assert kept['plain'] - kept['auto'] > 1.9 * x[..., :1].nbytes * HIDDEN


def network(gate):
    torch.manual_seed(0)
    before = nn.Conv2d(64, 64, 1), nn.BatchNorm2d(64), nn.SiLU(True)
    return nn.Sequential(*before, gate, nn.Conv2d(64, 8, 1)).double()


@pytest.mark.parametrize('build', GATES.values(), ids=GATES)
def test_squeeze_and_excitation_keeps_neither_map(build):
    kept, x = {}, torch.randn(2, 64, 12, 10, dtype=torch.float64)
    for way in ('auto', 'plain'):
        model = network(build())
        mmpeft.inject(model, dict(type='FLoRA', rank=2), execution=way)
        randomize(model)
        assert_as_plain(model, x)
        _, kept[way] = kept_bytes(model, x.clone().requires_grad_())
    assert kept['plain'] - kept['auto'] > 1.9 * x.nbytes


@pytest.mark.parametrize('build', [GATES['timm'], GATES['mmdet']])
def test_second_derivatives(build):
    model = network(build())
    mmpeft.inject(model, METHODS['flora'])
    randomize(model)
    x = torch.randn(2, 64, 4, 4, dtype=torch.float64)
    found = second_derivatives(model, x)
    with plain(model):
        assert_equal(found, second_derivatives(model, x), 1e-10)


@pytest.mark.parametrize('shape', [(2, 3, 1, 1), (3, 1, 1), (1, 3, 1, 1), (1,)])
def test_by_finite_differences(shape):
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    gate = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.equal(gated(x, gate), x * gate)
    assert torch.autograd.gradcheck(Gated(), [x, gate])
    assert torch.autograd.gradgradcheck(Gated(), [x, gate])


@pytest.mark.parametrize('amp', [False, True])
def test_products_that_are_no_gate_are_torchs(amp):
    """A module of the same class that multiplies by other things."""

    def forward(self, x):
        y = x * x + 2 * x + x * 2.0 + torch.mul(x, x.new_ones(3, *x.shape)).sum(0)
        return y + self.fc1(x.mean((2, 3), keepdim=True)).float().double().mean() * x

    model = network(SEModule(64))
    kind = type('SEModule', (SEModule,), dict(forward=forward, __module__=SEModule.__module__))
    model[3].__class__ = kind
    mmpeft.inject(model, METHODS['flora'])
    randomize(model)
    x = torch.randn(2, 64, 4, 4, dtype=torch.float64)
    if not amp:
        assert_as_plain(model, x)
        return
    with torch.autocast('cpu', torch.bfloat16):
        assert_as_plain(model.float(), x.float(), 0.1)
