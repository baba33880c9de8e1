"""Parameter-efficient fine-tuning of large vision backbones in OpenMMLab."""

from .version import __version__
