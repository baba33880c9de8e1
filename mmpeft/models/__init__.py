"""Backbones and necks that upstream lacks. Importing this needs timm."""

import timm.layers
from torch import Tensor

from mmpeft.registry import MODELS

from .intern_vit import InternViT
from .simple_feature_pyramid import SimpleFeaturePyramid
from .timm_backbone import TimmBackbone

__all__ = ['InternViT', 'SimpleFeaturePyramid', 'TimmBackbone']


@MODELS.register_module()
class LayerNorm2d(timm.layers.LayerNorm2d):
    """For ``norm_cfg=dict(type='mmpeft.LayerNorm2d')``: timm's, with a contiguous output.

    timm's is channels-last, and mmcv's RoIAlign reads memory as if it were contiguous.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape, normalized over the channels."""
        return super().forward(x).contiguous()
