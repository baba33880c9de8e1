"""Methods of parameter-efficient fine-tuning, one file each.

Every module of this package is imported, so that a method is registered by
being there.
"""

from importlib import import_module
from pkgutil import iter_modules

from .activation import ActivationAdapter, ActivationMethod
from .adapter import Adapter, WeightAdapter
from .allocator import Allocator
from .base import Card, Method
from .delta import DeltaMethod
from .ranked import Ranked

for _module in iter_modules(__path__):
    import_module(f'{__name__}.{_module.name}')

__all__ = [
    'ActivationAdapter',
    'ActivationMethod',
    'Adapter',
    'Allocator',
    'Card',
    'DeltaMethod',
    'Method',
    'Ranked',
    'WeightAdapter',
]
