"""Methods that act on activations, one file each, all imported."""

from importlib import import_module
from pkgutil import iter_modules

from .base import ActivationAdapter, ActivationMethod, BranchMethod

for _module in iter_modules(__path__):
    import_module(f'{__name__}.{_module.name}')

__all__ = ['ActivationAdapter', 'ActivationMethod', 'BranchMethod']
