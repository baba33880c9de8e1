"""Methods of parameter-efficient fine-tuning, one file each.

Every module of this package is imported, so that a method is registered by
being there.
"""

from importlib import import_module
from pkgutil import iter_modules

from .base import Adapter, DeltaMethod, Method, RankMethod

for _module in iter_modules(__path__):
    import_module(f'{__name__}.{_module.name}')

__all__ = ['Adapter', 'DeltaMethod', 'Method', 'RankMethod']
