"""Parameter-efficient fine-tuning of large vision backbones in OpenMMLab."""

from .injection import inject, merge, remove
from .registry import METHODS
from .summary import summary
from .version import __version__

__all__ = ['METHODS', '__version__', 'inject', 'merge', 'remove', 'summary']
