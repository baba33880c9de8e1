"""The registries of mmpeft.

``METHODS`` is our own. The others are children of mmengine's, so that a
config may name ``mmpeft.PEFTHook`` or ``mmpeft.TimmBackbone`` without
``custom_imports``: the scope prefix makes mmengine import this module, and
the registry then imports its ``locations``.
"""

import re
import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from mmengine.config.utils import MODULE2PACKAGE
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_CONSTRUCTORS
from mmengine.registry import OPTIM_WRAPPERS as MMENGINE_OPTIM_WRAPPERS
from mmengine.registry import Registry

from .errors import UsageError, suggest
from .version import __version__


def build_method(cfg: Any, registry: Registry, *args, **kwargs) -> Any:
    """Build a method from ``dict(type=..., ...)``; a method is returned as it is.

    Raises:
        UsageError: The config is not a dict with a ``type``, no method has the
            name, or an argument is unknown to the method or wrong.
    """
    if not isinstance(cfg, dict) and hasattr(cfg, 'apply'):
        kind = type(cfg)
        if registry.get(kind.__name__) is not kind:  # adapter files name methods
            raise UsageError(
                f'{kind.__name__} is not registered, so its adapter files could not be read. Write '
                '@mmpeft.methods.base.register above the class.'
            )
        return cfg
    if not isinstance(cfg, dict) or not cfg.get('type'):
        raise UsageError(f"A method is a dict such as dict(type='FLoRA', rank=32), not {cfg!r}.")
    given = dict(cfg)
    name = given.pop('type')
    method = registry.get(name) if isinstance(name, str) else name
    if method is None:
        raise UsageError(f'There is no method {name!r}. {suggest(name, registry.module_dict)}')
    return method(**known_arguments(method, given))


def known_arguments(method: type, given: Mapping[str, Any], where: str = '') -> dict[str, Any]:
    """Arguments under their present names; a former name is replaced with a warning.

    Args:
        method: The class of the method.
        given: Arguments by name.
        where: Where they were given, to begin messages with.

    Raises:
        UsageError: The method has no such argument.
    """
    known, arguments = [field.name for field in fields(method)], {}
    for name, value in given.items():
        present = getattr(method, 'renamed', {}).get(name, name)
        if present not in known:
            raise UsageError(
                f'{where}{method.__name__} has no argument {name!r}. {suggest(name, known)}'
            )
        if present in arguments or (present != name and present in given):
            raise UsageError(
                f'{where}{method.__name__}: {name!r} is the former name of {present!r}, and both '
                f'are given. Write {present!r} alone.'
            )
        if present != name:
            warnings.warn(
                f'{where}{method.__name__}: the argument {name!r} is now called {present!r}. '
                f'Write {present}={value!r}.',
                stacklevel=2,
            )
        arguments[present] = value
    return arguments


def modern_arguments(cfg: Mapping[str, Any], version: str = __version__) -> dict[str, Any]:
    """The config of a method from a file that an earlier version wrote, in present terms.

    Args:
        cfg: ``dict(type=..., ...)``, as stored.
        version: Of mmpeft, that wrote it.

    Returns:
        A new dict; of an unknown method an equal one.
    """
    METHODS.import_from_location()
    method = METHODS.module_dict.get(cfg.get('type'))  # get() would import dotted names
    if method is None:
        return dict(cfg)
    numbers = tuple(int(number) for number in re.findall(r'\d+', version)[:2])
    arguments = {name: value for name, value in cfg.items() if name != 'type'}
    return {'type': cfg['type'], **method.modernize(arguments, numbers)}


METHODS = Registry('method', build_func=build_method, scope='mmpeft', locations=['mmpeft.methods'])
HOOKS = Registry('hook', parent=MMENGINE_HOOKS, scope='mmpeft', locations=['mmpeft.engine.hooks'])
OPTIM_WRAPPERS = Registry(
    'optim wrapper',
    parent=MMENGINE_OPTIM_WRAPPERS,
    scope='mmpeft',
    locations=['mmpeft.engine.amp'],
)
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor',
    parent=MMENGINE_CONSTRUCTORS,
    scope='mmpeft',
    locations=['mmpeft.engine.layer_decay'],
)
MODELS = Registry('model', parent=MMENGINE_MODELS, scope='mmpeft', locations=['mmpeft.models'])

CONFIG_PACKAGES = ('mmpeft', 'mmseg')


def register_config_packages() -> None:
    """Let configs inherit from :data:`CONFIG_PACKAGES` by ``name::path``."""
    MODULE2PACKAGE.update({name: name for name in CONFIG_PACKAGES})
