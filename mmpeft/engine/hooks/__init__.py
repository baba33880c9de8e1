"""mmengine hooks: the adapters' place in a Runner."""

from .peft_hook import PEFTHook
from .seed_hook import SeedHook
from .update_hook import UpdateHook

__all__ = ['PEFTHook', 'SeedHook', 'UpdateHook']
