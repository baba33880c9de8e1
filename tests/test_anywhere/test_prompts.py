"""Prompts go where the block takes any number of tokens, or are refused."""

import pytest
import transformers as hf

import mmpeft
from mmpeft.errors import UsageError
from tests.hf_zoo import HF, VISION

VPT = dict(type='VPT', tokens=2)


@pytest.mark.parametrize(
    'module', ['text_model', 'text_model.encoder', 'text_model.encoder.layers']
)
def test_words_are_refused_whatever_the_target(module):
    """The mask of CLIP's words has their number, and their embedding may be above the target."""
    with pytest.raises(UsageError, match='VPT acts at insertion points of kind'):
        mmpeft.inject(HF['clip'].build(), VPT, dict(module=module))


@pytest.mark.parametrize('module', ['', 'vision_model.encoder', 'vision_model.encoder.layers'])
def test_images_take_them(module):
    model = HF['clip'].build()
    summary = mmpeft.inject(model, VPT, dict(module=module))
    assert 'vision_model' in summary.rows[0].name
    HF['clip'].loss(model).backward()


def test_maps_of_sam_are_refused():
    sizes = VISION | dict(image_size=64, patch_size=16, output_channels=16, mlp_dim=32)
    for rel_pos in (True, False):
        config = hf.SamVisionConfig(
            **sizes, num_pos_feats=8, window_size=0, global_attn_indexes=(0, 1), use_rel_pos=rel_pos
        )
        with pytest.raises(UsageError, match='VPT acts at insertion points of kind'):
            mmpeft.inject(hf.SamVisionModel(config), VPT, dict(module='vision_encoder.layers'))
