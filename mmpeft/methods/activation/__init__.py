"""Methods that act on activations, one file each."""

from . import adaptformer, bottleneck, conv_adapter, convpass, mona, parallel, prompts
from .base import ActivationAdapter, ActivationMethod, BranchMethod

__all__ = ['ActivationAdapter', 'ActivationMethod', 'BranchMethod']
