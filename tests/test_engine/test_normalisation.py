"""A data preprocessor that disagrees with what the weights expect is found."""

import pytest
from mmengine.logging import MMLogger
from torch import nn

from mmpeft.engine.normalisation import normalisation_fault
from mmpeft.models import TimmBackbone
from tests.backbones import SMALL
from tests.toy_runs import run

SIGLIP = 'vit_base_patch16_siglip_512.v2_webli'
IMAGENET = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True)
HALF = dict(mean=[127.5] * 3, std=[127.5] * 3, bgr_to_rgb=True)


def model(images, pretrained=True, kind='DetDataPreprocessor'):
    from mmdet.models import DetDataPreprocessor
    from mmpretrain.models.utils import ClsDataPreprocessor
    from mmseg.models import SegDataPreProcessor

    kinds = {k.__name__: k for k in (ClsDataPreprocessor, DetDataPreprocessor, SegDataPreProcessor)}
    if kind == 'ClsDataPreprocessor':
        images = {key.replace('bgr_to_rgb', 'to_rgb'): value for key, value in images.items()}
    result = nn.Module()
    result.data_preprocessor = kinds[kind](**images)
    result.backbone = TimmBackbone(SIGLIP, pretrained=pretrained, **SMALL[SIGLIP])
    return result


@pytest.mark.parametrize(
    'kind, key',
    [
        ('ClsDataPreprocessor', 'to_rgb'),
        ('DetDataPreprocessor', 'bgr_to_rgb'),
        ('SegDataPreProcessor', 'bgr_to_rgb'),
    ],
)
def test_what_to_write_is_said(kind, key):
    fault = normalisation_fault(model(IMAGENET, kind=kind))
    assert SIGLIP in fault and 'model.data_preprocessor=dict(mean=[127.5, 127.5, 127.5], ' in fault
    assert f'std=[58.395, 57.12, 57.375], {key}=True' in fault
    assert fault.endswith(f' {key}=True), unless the images are in RGB already.')
    assert normalisation_fault(model(HALF, kind=kind)) is None
    assert f', {key}=False' in normalisation_fault(model(HALF | dict(bgr_to_rgb=False), kind=kind))


def test_without_pretrained_weights_anything_goes():
    assert normalisation_fault(model(IMAGENET, pretrained=False)) is None
    assert normalisation_fault(nn.Linear(2, 2)) is None


def test_a_run_warns_once(tmp_path, monkeypatch):
    texts = []
    monkeypatch.setattr(MMLogger, 'warning', lambda self, text, *_: texts.append(text))
    monkeypatch.setattr('mmpeft.engine.hooks.peft_hook.normalisation_fault', lambda model: 'grey')
    run(tmp_path, method=dict(type='LoRA', rank=1), stop=1)
    assert texts.count('grey') == 1
