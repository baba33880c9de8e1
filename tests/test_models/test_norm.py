"""The norm of feature maps that ``norm_cfg`` names."""

import timm.layers
import torch
from mmcv.ops import RoIAlign

from mmpeft.registry import MODELS


def test_roi_align_reads_its_output_right():
    own = MODELS.build(dict(type='mmpeft.LayerNorm2d', num_channels=8))
    theirs = timm.layers.LayerNorm2d(8)
    images = torch.randn(2, 8, 16, 16)
    boxes = torch.tensor([[0, 1.0, 1, 9, 9], [1, 2, 3, 12, 11]])
    align = RoIAlign(7, 1.0, 2)
    expected = align(theirs(images).contiguous(), boxes)
    assert torch.equal(align(own(images), boxes), expected)
    assert not torch.allclose(align(theirs(images), boxes), expected)  # or the subclass can go
