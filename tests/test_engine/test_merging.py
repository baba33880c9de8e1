"""The config and the weights of a merged model."""

import mmengine
import torch
from mmengine.registry import MODELS
from torch import nn

import mmpeft
from mmpeft.engine.merging import merged
from mmpeft.models import InternViT
from tests.test_injection.test_quantized import noisy

ARCH = dict(depth=2, width=64, heads=2, hidden=128, image_size=56)


@MODELS.register_module()
class Holder(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = MODELS.build(backbone)


def test_a_backbone_in_few_bits_becomes_plain():
    """Rounded once more it would be another model."""
    backbone = dict(type='mmpeft.InternViT', arch=ARCH, frozen_dtype='nf4')
    cfg = mmengine.Config(dict(model=dict(type='Holder', backbone=backbone)))
    model = MODELS.build(cfg.model).eval()
    mmpeft.inject(model, dict(type='LoRA', rank=2), dict(module='backbone'))
    noisy(model, 0.01)
    images = torch.randn(1, 3, 56, 56)
    expected = model.backbone(images)[-1]
    plain, state = merged(model, cfg)
    again = MODELS.build(plain.model).eval()
    again.load_state_dict(state)
    assert isinstance(again.backbone, InternViT) and plain.model.backbone.frozen_dtype == 'bfloat16'
    found = again.backbone(images)[-1]
    assert torch.equal(found, model.backbone(images)[-1])
    assert (found - expected).norm() < 0.02 * expected.norm()
