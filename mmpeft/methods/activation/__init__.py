"""Methods that act on activations, one file each."""

from . import bottleneck, mona, parallel, prompts
from .base import ActivationAdapter, ActivationMethod, BranchMethod

__all__ = ['ActivationAdapter', 'ActivationMethod', 'BranchMethod']
