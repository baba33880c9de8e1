"""Parameter-efficient fine-tuning of large vision backbones in OpenMMLab."""

from .checkpoint import adapter_state_dict, load_adapter, save_adapter
from .compat import register_config_packages
from .injection import inject, merge, remove
from .registry import METHODS
from .summary import summary
from .version import __version__

__all__ = [
    'METHODS',
    '__version__',
    'adapter_state_dict',
    'inject',
    'load_adapter',
    'merge',
    'remove',
    'save_adapter',
    'summary',
]

register_config_packages()
