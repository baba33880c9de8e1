"""The registries of mmpeft.

``METHODS`` is our own. The others are children of mmengine's, so that a
config may name ``mmpeft.PEFTHook`` or ``mmpeft.TimmBackbone`` without
``custom_imports``: the scope prefix makes mmengine import this module, and
the registry then imports its ``locations``.
"""

from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import Registry

METHODS = Registry('method', scope='mmpeft', locations=['mmpeft.methods'])
HOOKS = Registry('hook', parent=MMENGINE_HOOKS, scope='mmpeft', locations=['mmpeft.hooks'])
MODELS = Registry('model', parent=MMENGINE_MODELS, scope='mmpeft', locations=['mmpeft.models'])
