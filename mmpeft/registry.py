"""The registries of mmpeft.

``METHODS`` is our own. The others are children of mmengine's, so that a
config may name ``mmpeft.PEFTHook`` or ``mmpeft.TimmBackbone`` without
``custom_imports``: the scope prefix makes mmengine import this module, and
the registry then imports its ``locations``.
"""

from dataclasses import fields

from mmengine.config.utils import MODULE2PACKAGE
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import Registry

from .errors import UsageError, near


def build_method(cfg, registry, *args, **kwargs):
    """Build a method from ``dict(type=..., ...)``; a built one is returned as it is.

    Raises:
        UsageError: The config is no dict with a ``type``, or an argument is
            unknown to the method.
        UsageError: No method has the name.
    """
    if not isinstance(cfg, dict) and hasattr(cfg, 'apply'):
        return cfg
    if not isinstance(cfg, dict) or 'type' not in cfg:
        raise UsageError(f"A method is a dict such as dict(type='FLoRA', rank=32), not {cfg!r}.")
    given = dict(cfg)
    name = given.pop('type')
    method = registry.get(name) if isinstance(name, str) else name
    if method is None:
        raise UsageError(f'There is no method {name!r}. {near(name, registry.module_dict)}')
    known = [field.name for field in fields(method)]
    for argument in given:
        if argument not in known:
            raise UsageError(
                f'{method.__name__} has no argument {argument!r}. {near(argument, known)}'
            )
    return method(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


METHODS = Registry('method', build_func=build_method, scope='mmpeft', locations=['mmpeft.methods'])
HOOKS = Registry('hook', parent=MMENGINE_HOOKS, scope='mmpeft', locations=['mmpeft.engine.hooks'])
MODELS = Registry('model', parent=MMENGINE_MODELS, scope='mmpeft', locations=['mmpeft.models'])

CONFIG_PACKAGES = ('mmpeft', 'mmseg')


def register_config_packages():
    """Let configs inherit from :data:`CONFIG_PACKAGES` by ``name::path``."""
    MODULE2PACKAGE.update({name: name for name in CONFIG_PACKAGES})
