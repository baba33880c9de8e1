"""Composition: a run is a config, a method, and options on top.

Any method of ``configs/_base_/methods`` can be put into any config, of mmpeft
or of an OpenMMLab package, so that no file has to exist for the combination.
"""

import copy
import os
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict

from mmpeft.errors import MissingFileError, UsageError, suggest
from mmpeft.injection.targets import as_dict
from mmpeft.methods import ActivationMethod
from mmpeft.methods.spec import KINDS, POINT_KINDS
from mmpeft.registry import METHODS

from .method_argument import is_name, method_name, methods_in, read_method
from .packages import INSTALL, find_config, not_installed

HOOK = 'mmpeft.PEFTHook'


def compose(
    config: str | Path | Config,
    method: str | Mapping | list | None = None,
    options: Mapping | None = None,
) -> Config:
    """Read a config, put a method into its hook, and merge options into the result.

    The method replaces what the config says of ``method``; whatever else it
    says of the hook stays. A config without the hook gets one that adapts its
    ``backbone``, and two settings that suit a backbone that trains are changed.
    What is changed beside the method is printed.

    Args:
        config: A file, ``package::path`` for one that a package ships, or a
            config, which is copied.
        method: See :func:`read_method`; None keeps the config's.
        options: By dotted keys, as ``--cfg-options`` gives them.

    Raises:
        UsageError: The config or a package is missing, the method is unknown,
            or its arguments are those of another method.
    """
    cfg = read_config(config)
    if method is not None:
        _set_method(cfg, read_method(method), is_written_out=not is_name(method))
    if not isinstance(options, Mapping | None):
        raise UsageError(
            f'options={options!r} must be a dict by dotted keys, such as '
            "{'default_hooks.peft.method.rank': 16}."
        )
    if options:
        before, new = _types_in(cfg), [key for key in options if key not in cfg]
        hooks = [*(cfg.get('default_hooks') or {})]
        try:
            cfg.merge_from_dict(copy.deepcopy(dict(options)))
        except (TypeError, KeyError, IndexError) as error:
            raise UsageError(
                f'--cfg-options do not fit the config: {error}. An item of a list is named by its '
                'number, such as default_hooks.peft.method.0.rank=4.'
            ) from error
        _check_keys(cfg, new)
        if find_hook(cfg) is None and 'peft' in (cfg.get('default_hooks') or {}):
            raise UsageError(
                f'--cfg-options: {cfg.filename} has no PEFTHook whose arguments default_hooks.peft '
                'would be. Name a method by --method, such as --method flora.'
            )
        _check_hooks(cfg, hooks)
        if _types_in(cfg) != before:
            _check_methods(cfg, before)
    for node in dicts_in(cfg._cfg_dict):
        node.pop('_delete_', None)  # stays where there was nothing to delete
    return cfg


def read_config(config: str | Path | Config) -> Config:
    """Read a config as it is; see :func:`compose`."""
    if isinstance(config, Config):
        return copy.deepcopy(config)
    path = find_config(str(config)) if '::' in str(config) else Path(config)
    if not path.is_file():
        known = sorted(map(str, Path('configs').glob('[!_]*/*.py')))
        hint = suggest(
            str(config), known, otherwise='Name a file, such as one of configs/ in the repository.'
        )
        raise MissingFileError(
            f'There is no config {str(config)!r} in {Path.cwd()}. {hint} Configs of a package are '
            "written as 'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py'; mmseg::, mmrotate::, "
            'mmpretrain:: and mmpeft:: likewise.'
        )
    try:
        cfg = Config.fromfile(path)
        nodes = list(dicts_in(cfg._cfg_dict))  # imports classes that are named by `import`
    except (TypeError, ImportError) as error:  # a dict over something else; an unknown name
        package = (getattr(error, 'name', None) or str(error)).split()[0].split('.')[0]
        missing = isinstance(error, ModuleNotFoundError) and package in INSTALL
        fault = not_installed(path, package) if missing else f'{path}: {error}'
        raise UsageError(fault) from error
    for node in nodes:
        # `mmpeft::` in _base_ marks what it brings as of scope mmpeft, and mmengine then warns
        # about every registry that mmpeft does not have. The names resolve under any scope.
        if node.get('_scope_') == 'mmpeft':
            del node['_scope_']
        if type_name(node).startswith('mmpeft.methods.'):
            node['type'] = class_name(node)
    task = type_name(cfg.get('model')).partition('.')[0]
    if cfg.get('default_scope') is None and task in INSTALL:
        cfg.default_scope = task  # of a config whose types are classes
    return cfg


def find_hook(cfg: Config) -> ConfigDict | None:
    """What a config says of its PEFTHook, to be read and changed; None if it has none."""
    hooks = [*(cfg.get('default_hooks') or {}).values(), *(cfg.get('custom_hooks') or ())]
    own = [h for h in hooks if class_name(h) == 'PEFTHook']
    return own[0] if own else None


def type_name(node: Any) -> str:
    """The ``type`` of a dict in a config, whether it is a name or a class; '' for none."""
    kind = node.get('type', '') if isinstance(node, dict) else ''
    return kind if isinstance(kind, str) else f'{kind.__module__}.{kind.__qualname__}'


def class_name(node: Any) -> str:
    """The same without its scope or module."""
    return type_name(node).rpartition('.')[2]


def dicts_in(node) -> Iterator[dict]:
    """All dicts in nested dicts, lists and tuples, the outer ones first."""
    if isinstance(node, dict):
        yield node
        node = node.values()
    elif not isinstance(node, (list, tuple)):
        return
    for value in node:
        yield from dicts_in(value)


def run_name(config: str | Path | Config, method: str | Mapping | list | None = None) -> str:
    """Method and config in one relative path, such as ``flora/convnext_coco``.

    Without a method, the path of the config below ``configs``.
    """
    file = config.filename if isinstance(config, Config) else str(config).replace('::', '/configs/')
    parts = Path(file or 'config').resolve().with_suffix('').parts
    if method is not None:
        return str(Path(method_name(method), parts[-1]))
    depth = parts[-2::-1].index('configs') + 1 if 'configs' in parts[:-1] else 1
    return str(Path(*parts[-depth:]))


def _set_method(cfg, given, is_written_out):
    """What a method file brings gives way to the config's, and what the user wrote out does not."""
    cfg.pop('peft', None)  # of the method file that the config inherits
    hook = find_hook(cfg)
    if hook is None:
        targets = dict(module='backbone') | as_dict(given.get('targets'))
        cfg.default_hooks = cfg.get('default_hooks') or ConfigDict()
        cfg.default_hooks.peft = dict(type=HOOK, **given | dict(targets=targets))
        if any(kind.adapts and not kind.trains_base for kind in _kinds_of(given)):
            _suit_adapters(cfg)
        return
    targets = _fitting(as_dict(hook.get('targets')), _kinds_of(hook), _kinds_of(given))
    hook.pop('method', None)
    own, others = as_dict(given.get('targets')), {k: hook[k] for k in ('unfreeze',) if k in hook}
    hook.update(others | given if is_written_out else given | others)
    hook.targets = targets | own if is_written_out else own | targets


def _kinds_of(hook):
    found = [METHODS.get(each['type']) for each in methods_in(hook)]
    return [kind for kind in found if kind is not None]


def _fitting(targets, before, after):
    """A hook's targets without what only its former methods can have."""
    if [tuple(targets.get('kinds') or ())] == [kind.kinds for kind in before]:
        del targets['kinds']  # the default of the former method, not a choice
    acts = [issubclass(kind, ActivationMethod) for kind in after]
    known = (POINT_KINDS if any(acts) else ()) + (() if all(acts) else KINDS)
    for key in ('kinds', 'exclude_kinds'):
        value = targets.get(key) or ()
        kinds = (value,) if isinstance(value, str) else tuple(value)
        lost = [kind for kind in kinds if kind not in known]
        if lost:
            targets[key] = tuple(kind for kind in kinds if kind in known)
            if not targets[key]:
                del targets[key]
            print_on_master(
                f'targets.{key}: {", ".join(lost)} dropped, which the new method cannot have.'
            )
    arguments = set().union(*map(_arguments, after))
    for pattern, changed in dict(targets.get('overrides') or {}).items():
        if not arguments.issuperset(changed):
            targets['overrides'] = {k: v for k, v in targets['overrides'].items() if k != pattern}
            print_on_master(
                f'targets.overrides[{pattern!r}] dropped: arguments of the former method.'
            )
    return targets


def _suit_adapters(cfg):
    """Undo what upstream configs do to a backbone that is pretrained and trains itself."""
    backbone = (cfg.get('model') or {}).get('backbone') or {}
    frozen = backbone.get('frozen_stages')
    if isinstance(frozen, int) and frozen >= 0:
        backbone.frozen_stages = -1
        print_on_master(
            f'model.backbone.frozen_stages: {frozen} -> -1 (the hook freezes the base; the '
            'adapters in these stages would be frozen too).'
        )
    paramwise = (cfg.get('optim_wrapper') or {}).get('paramwise_cfg') or {}
    for key, value in (paramwise.get('custom_keys') or {}).items():
        if 'backbone' in key and value.get('lr_mult', 1.0) < 1:
            print_on_master(
                f'optim_wrapper.paramwise_cfg.custom_keys[{key!r}].lr_mult: {value.lr_mult:g} -> 1 '
                '(it is for pretrained weights, not for adapters).'
            )
            value.lr_mult = 1.0


def _check_keys(cfg, new):
    """Refuse an argument of the method that is written as a key of the config itself."""
    known = set().union(*map(_arguments, _kinds_of(find_hook(cfg) or {})))
    for key in new:
        if key in known:
            raise UsageError(
                f'--cfg-options: {key!r} is an argument of the method, and would be a key of the '
                f'config that nothing reads. Write default_hooks.peft.method.{key}.'
            )


def _check_hooks(cfg, before):
    """Refuse keys of a hook that the config did not have, such as a misspelt one."""
    for name, hook in (cfg.get('default_hooks') or {}).items():
        if isinstance(hook, dict) and name not in before and not hook.get('type'):
            raise UsageError(
                f'--cfg-options: the config has no hook default_hooks.{name}, and its type is not '
                f'given. {suggest(name, before)}'
            )


def _types_in(cfg):
    return [each['type'] for each in methods_in(find_hook(cfg) or {})]


def _check_methods(cfg, before):
    for method in methods_in(find_hook(cfg)):
        try:
            METHODS.build(method)
        except UsageError as error:
            raise UsageError(
                f'--cfg-options: {error} The config is for {", ".join(before)}. Replace the whole '
                'method by --method, or add default_hooks.peft.method._delete_=True to '
                '--cfg-options.'
            ) from error


def _arguments(kind):
    return {field.name for field in fields(kind)} | set(kind.renamed)


def print_on_master(text: str) -> None:
    """Print a line in the first process of a run, and in no other."""
    if os.environ.get('RANK', os.environ.get('SLURM_PROCID', '0')) == '0':
        print(text)
