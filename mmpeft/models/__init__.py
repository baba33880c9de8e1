"""Backbones that upstream lacks. Importing this needs timm."""

from .timm_backbone import TimmBackbone

__all__ = ['TimmBackbone']
