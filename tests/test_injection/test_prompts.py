"""Prompts among the tokens of an image, and methods that convolve these."""

import pytest
import timm
import torch

import mmpeft
import mmpeft.injection.inject as injection
from mmpeft.errors import UsageError

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')
VPT = dict(type='VPT', tokens=2, deep=True)


def vit():
    return timm.create_model('vit_tiny_patch16_224', img_size=32, embed_dim=8, depth=2, num_heads=2)


@pytest.mark.parametrize('method', ['Mona', 'Convpass'])
@pytest.mark.parametrize('prompts_first', [True, False])
def test_prompts_are_not_taken_for_class_tokens(method, prompts_first):
    model, methods = vit(), [VPT, dict(type=method, rank=2)]
    first, second = methods if prompts_first else methods[::-1]
    mmpeft.inject(model, first)
    before = model.state_dict()
    with pytest.raises(UsageError, match=f"VPT puts prompts among .*'blocks.0', and {method}"):
        mmpeft.inject(model, second)
    assert model.state_dict().keys() == before.keys()


def test_in_different_blocks_they_go_together():
    model = vit()
    mmpeft.inject(model, VPT, dict(include=r'blocks\.1'))
    mmpeft.inject(model, dict(type='Mona', rank=2), dict(exclude=r'blocks\.1'))
    assert model(torch.randn(1, 3, 32, 32)).isfinite().all()


def test_a_file_with_both_is_refused(tmp_path, monkeypatch):
    model, path = vit(), tmp_path / 'both.safetensors'
    with monkeypatch.context() as patch:
        patch.setattr(injection, 'check_prompts', lambda model, sites: None)
        for method in (VPT, dict(type='Mona', rank=2)):
            mmpeft.inject(model, method)
    mmpeft.save_adapter(model, path)
    with pytest.raises(UsageError, match='VPT puts prompts among'):
        mmpeft.load_adapter(vit(), path)
