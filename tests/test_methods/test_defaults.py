"""Every method of ``configs/_base_/methods`` on ConvNeXt-V2-B's layers, without a warning."""

import warnings
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
from mmengine.config import Config

import mmpeft
from mmpeft.methods import Ranked

FILES = sorted(Path(__file__).parents[2].glob('configs/_base_/methods/*.py'))


@cache
def convnext():
    """A block of each stage, without adapters and values; each test removes its own."""
    with torch.device('meta'):
        return timm.create_model('convnextv2_base', depths=(1, 1, 1, 1), features_only=True)


@pytest.mark.parametrize('file', FILES, ids=lambda file: file.stem)
def test_no_method_warns_by_default(file):
    method = mmpeft.METHODS.build(Config.fromfile(file).peft['method'])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        summary = mmpeft.inject(convnext(), method)
    mmpeft.remove(convnext())
    assert bool(summary.rows) is method.adapts
    assert not isinstance(method, Ranked) or not summary.oversized


def test_there_are_all_methods():
    used = {Config.fromfile(file).peft['method']['type'] for file in FILES}
    assert used == set(mmpeft.METHODS.module_dict)
