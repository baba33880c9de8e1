"""Backbones and necks that upstream lacks. Importing this needs timm."""

from timm.layers import LayerNorm2d

from mmpeft.registry import MODELS

from .intern_vit import InternViT
from .simple_feature_pyramid import SimpleFeaturePyramid
from .timm_backbone import TimmBackbone

__all__ = ['InternViT', 'SimpleFeaturePyramid', 'TimmBackbone']

# For norm_cfg=dict(type='mmpeft.LayerNorm2d'), as in the pyramid on InternViT.
MODELS.register_module(module=LayerNorm2d)
