"""Methods on activations in networks of other libraries: where they act, and that all train."""

from collections import Counter

import pytest
import torch
from mmpretrain.models import ConvNeXt

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.injection.site import named_adapters
from mmpeft.methods.spec import POINT_KINDS
from tests.zoo import NETWORKS

# Insertion points that Houlsby takes, number of layers that are called, and what VPT takes.
EXPECTED = dict(
    timm_convnext=(dict(mixer=4, mlp=4), 17, dict(border=1)),
    timm_convnextv2=(dict(mixer=4, mlp=4), 17, dict(border=1)),
    timm_vit=(dict(attention=2, mlp=2), 10, dict(tokens=2)),
    timm_swin=(dict(attention=3, mlp=3), 15, {}),
    timm_swinv2=(dict(attention=3, mlp=3), 18, {}),
    timm_eva02=(dict(attention=2, mlp=2), 8, {}),
    timm_dinov3=(dict(attention=2, mlp=2), 10, {}),
    timm_beit=(dict(attention=2, mlp=2), 8, {}),
    timm_pvtv2=(dict(attention=4, mlp=4), 32, dict(border=1)),
    timm_maxvit=(dict(attention=4, mlp=4), 37, {}),
    timm_resnet=(dict(branch=4), 14, dict(border=1)),
    timm_regnet=({}, 71, {}),
    timm_efficientnet=(dict(branch=9), 50, dict(border=1)),
    timm_mobilenet=(dict(branch=8), 54, dict(border=1)),
    torchvision_swin=(dict(attention=3, mlp=3), 9, {}),
    mmdet_swin=(dict(attention=3, mlp=3), 14, {}),
    mmdet_resnet=(dict(branch=8), 20, dict(border=1)),
    mmdet_cspnext=({}, 37, {}),
    mmseg_mit=(dict(attention=4, mlp=4), 19, dict(border=1)),
    mmseg_cgnet=({}, 25, dict(border=1)),
    mmseg_beit=(dict(attention=2, mlp=2), 7, {}),
    mmseg_mscan=(dict(branch=4, mlp=4), 57, dict(border=1)),
    mmpretrain_beit=(dict(attention=2, mlp=2), 7, {}),
    hf_bert=(dict(attention=2, mlp=2), 13, {}),
    hf_roberta=(dict(attention=2, mlp=2), 13, {}),
    hf_deberta=(dict(attention=2, mlp=2), 16, {}),
    hf_vit=(dict(attention=2, mlp=2), 14, dict(tokens=2)),
    hf_dinov2=(dict(attention=2, mlp=2), 13, dict(tokens=2)),
    hf_dinov3=(dict(attention=2, mlp=2), 13, {}),
    hf_t5=(dict(attention=6, mlp=4), 33, {}),
    hf_gpt2=(dict(attention=2, mlp=2), 9, {}),
    hf_llama=(dict(attention=2, mlp=2), 15, {}),
    hf_clip=(dict(attention=4, mlp=4), 27, dict(tokens=2)),
    hf_clip_vision=(dict(attention=2, mlp=2), 13, dict(tokens=2)),
    hf_sam=(dict(attention=9, mlp=4, branch=1), 63, dict(border=1)),
    hf_segformer=(dict(attention=4, mlp=4), 41, dict(border=1)),
    hf_detr=(dict(attention=5, mlp=3), 33, {}),
    hf_convnextv2=(dict(branch=5), 19, dict(border=1)),
    hf_dinov3_convnext=(dict(branch=5), 19, dict(border=1)),
    hf_swin=(dict(attention=3, mlp=3), 20, {}),
)
# SAM embeds masks only where it is given some.
UNUSED = {'hf_sam': 3}


@pytest.mark.filterwarnings('ignore:.*adapters have more parameters')
@pytest.mark.parametrize('name', NETWORKS)
def test_methods_on_activations(name):
    points, layers, prompts = EXPECTED[name]
    after = {kind: number for kind, number in points.items() if kind in ('mlp', 'branch')}
    expected = dict(
        HoulsbyAdapter=points,
        PfeifferAdapter=after,
        ScaledParallelAdapter={kind: n for kind, n in points.items() if kind == 'mlp'},
        ParallelAdapter=dict(layer=layers),
        VPT=prompts,
    )
    torch.manual_seed(0)
    model = NETWORKS[name].build()
    model.train()
    for method, kinds in expected.items():
        if not kinds:
            with pytest.raises(UsageError, match=f'^{method} acts at insertion points of kind'):
                mmpeft.inject(model, dict(type=method))
            continue
        mmpeft.inject(model, dict(type=method))
        adapters = named_adapters(model).values()
        found = [kind for a in adapters for kind in POINT_KINDS if kind in a.spec.kinds]
        assert Counter(found) == kinds or (method == 'VPT' and found[:1] == [*kinds]), method
        NETWORKS[name].loss(model).backward()
        still = [a for a in adapters if any(p.grad is None for p in a.parameters())]
        assert len(still) == (UNUSED.get(name, 0) if method == 'ParallelAdapter' else 0), method
        mmpeft.remove(model)


def test_every_network_has_an_expectation():
    assert EXPECTED.keys() == NETWORKS.keys()


@pytest.mark.parametrize('linear', [True, False])
def test_mona_on_mmpretrains_convnext(linear):
    """Its 1x1 convolutions may be linear layers, channels last in a block that has them first."""
    arch = dict(depths=[1, 1], channels=[8, 16])
    model = ConvNeXt(arch, linear_pw_conv=linear, out_indices=1)
    model.eval()
    x = torch.randn(1, 3, 32, 32)
    expected = model(x)[0]
    mmpeft.inject(model, dict(type='Mona', rank=2))
    torch.testing.assert_close(model(x)[0], expected)
