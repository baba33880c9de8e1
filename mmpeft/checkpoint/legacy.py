"""Adapter files and checkpoints of mmpeft 0.2 and 0.3; to be deleted when nobody has any left.

Their manifest repeats the arguments of :func:`mmpeft.inject`, with regular
expressions, instead of listing the adapters. :func:`upgraded` finds the
adapters as those versions did and gives a manifest of the present format.
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

from torch import Tensor, nn

from mmpeft.errors import UsageError
from mmpeft.injection.freeze import plain_parameters
from mmpeft.injection.insertion_points import insertion_points
from mmpeft.injection.points import point_at
from mmpeft.injection.ranks import settle_ranks
from mmpeft.injection.site import Site, attached
from mmpeft.injection.targets import Targets, target_module
from mmpeft.injection.weights import ADAPTERS, join, layers, weights_of
from mmpeft.methods import ActivationMethod
from mmpeft.registry import METHODS, modern_arguments

from .manifest import MOST_INJECTIONS, list_adapters
from .plain_data import built, check_arguments, check_fields, checked_method
from .safe_patterns import check_patterns

MANIFEST = dict(version=str, torch=str, injections=list[dict], parameters=int, fingerprint=str)
VERSION = '0.3'
SINCE_0_3 = ('torch', 'parameters')
INJECTION = dict(method=dict, targets=dict, unfreeze=list[str])


def is_former(manifest: Mapping) -> bool:
    """Whether a manifest is of mmpeft 0.2 or 0.3."""
    return 'adapters' not in manifest


def check_former(manifest: Mapping) -> None:
    """Refuse a manifest that those versions cannot have written.

    Raises:
        UsageError: The message says what is wrong.
    """
    check_fields(manifest, MANIFEST, 'The manifest', optional=SINCE_0_3)
    injections = manifest['injections']
    if not 1 <= len(injections) <= MOST_INJECTIONS:
        raise UsageError(
            f'The manifest has {len(injections)} injections, not 1 to {MOST_INJECTIONS}.'
        )
    for injection in injections:
        check_fields(injection, INJECTION, 'An injection')
        targets = injection['targets']
        checked_method(injection['method'], VERSION)
        check_arguments(targets, Targets)
        built(Targets.of, targets)
        for changes in targets.get('overrides', {}).values():
            checked_method(injection['method'] | changes, VERSION)


def upgraded(model: nn.Module, manifest: Mapping, state: Mapping[str, Tensor]) -> dict:
    """The manifest in the present format.

    Args:
        model: That the adapter is to be loaded into, adapted or not; is not
            changed.
        manifest: Checked by :func:`check_former`.
        state: The state dict beside it, whose keys say where activations are
            adapted.

    Raises:
        UsageError: The targets do not fit the model, or their patterns may be
            slow and are needed.
    """
    numbered, injections = [], []
    for number, injection in enumerate(manifest['injections']):
        targets, unfreeze = Targets.of(injection['targets']), injection['unfreeze']
        method = METHODS.build(modern_arguments(injection['method'], VERSION))
        root, trained = target_module(model, targets.module), []
        if _are_fast(model, targets, unfreeze):
            sites = _sites(root, injection, method, targets, state)
            names = list(plain_parameters(root))
            _check_matches(unfreeze, names)
            trained = [name for name in names if _matches(unfreeze, name)]
        else:
            sites = [
                replace(s, method=method) for s in attached(model) if s.adapter.injection == number
            ]
        method = settle_ranks(method, sites, targets.max_share)
        numbered += [(number, site) for site in sites]
        injections.append(dict(method=method.config(), module=targets.module, trained=trained))
    methods, adapters = list_adapters(numbered)
    found = dict(injections=injections, methods=methods, adapters=adapters)
    return dict(torch='', parameters=0) | dict(manifest) | found


def former_method(config, manifest: Mapping | None):
    """A method for a model into which a checkpoint is going to be loaded.

    Defaults of some arguments have changed since 0.3. So arguments that the
    config does not give are taken from a checkpoint of these versions.

    Args:
        config: The config of a method, or a method.
        manifest: What the checkpoint says, of any version; None if it has no adapters.

    Returns:
        The method, or ``config`` itself.

    Raises:
        UsageError: An argument is invalid.
    """
    if not isinstance(config, Mapping) or manifest is None or not is_former(manifest):
        return config
    check_former({key: value for key, value in manifest.items() if key in MANIFEST})
    for injection in manifest['injections']:
        if injection['method']['type'] == config.get('type'):
            return METHODS.build(modern_arguments(injection['method'], VERSION) | dict(config))
    return config


def _are_fast(model, targets, unfreeze):
    """Whether all patterns are certain to be fast; if not, the model tells what they found."""
    try:
        check_patterns([*unfreeze, *targets.include, *targets.exclude, *targets.overrides])
    except UsageError as error:
        if getattr(model, 'peft', []) and not targets.overrides:
            return False
        raise UsageError(
            f'{error} Adapt the model first, by mmpeft.inject with the same method and targets of '
            'your own, then load the file into it.'
        ) from error
    return True


def _check_matches(patterns, names):
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            raise UsageError(f'Its pattern {pattern!r} matches nothing in the model.')


def _sites(root, injection, method, targets, state):
    if isinstance(method, ActivationMethod):
        candidates = list(_points(root, method, targets, state))
    else:
        candidates = [
            (path, layer, tensor, spec)
            for path, layer in layers(root)
            for tensor, spec in weights_of(layer)
            if method.accepts(spec)
        ]
        patterns = *targets.include, *targets.exclude, *targets.overrides
        _check_matches(patterns, [join(path, tensor) for path, _, tensor, _ in candidates])
    return [
        Site(join(targets.module, path), layer, tensor, spec, _overridden(injection, name))
        for path, layer, tensor, spec in candidates
        if _is_selected(name := join(path, tensor), spec, method, targets)
    ]


def _points(root, method: ActivationMethod, targets, state):
    """Insertion points at the modules that have adapters of activations in the state dict."""
    found = {path: point for path, _, point in insertion_points(root, method.kinds)}
    found = {p: point for p, point in found.items() if method.accepts(point) and not point.ends}
    own, mark = dict(layers(root)), f'.{ADAPTERS}.'
    prefix = f'{targets.module}.' if targets.module else ''
    if method.tied:  # all that share a tensor, which is stored under the first one's key
        points = method.narrow(found)
    else:
        holders = {key.partition(mark)[0] for key in state if mark in key}
        holders = [key.removeprefix(prefix) for key in holders if key.startswith(prefix)]
        points = dict(_point_of(holder, own, found, method) for holder in holders)
    for path, layer in own.items():
        if points.get(path):
            yield path, layer, '', points[path]


def _point_of(holder, own, found, method):
    """The path and the insertion point of the module whose adapters another one held."""
    paths = [holder]
    while isinstance(above := own.get(paths[-1].rpartition('.')[0]), nn.Sequential):
        if above[-1] is not own.get(paths[-1]) or not paths[-1]:
            break
        paths.append(paths[-1].rpartition('.')[0])
    for path in paths:
        if path in found:
            return path, found[path]
    for kind in reversed(method.kinds) if len(paths) == 1 and holder in own else ():
        with suppress(UsageError):
            point = point_at(own[holder], kind)
            if method.accepts(point):
                return holder, point
    return holder, None


def _is_selected(name, spec, method, targets):
    kinds = method.kinds if targets.kinds is None else targets.kinds
    return (
        (kinds is None or bool(spec.kinds.intersection(kinds)))
        and not spec.kinds.intersection(targets.exclude_kinds)
        and (not targets.include or _matches(targets.include, name))
        and not _matches(targets.exclude, name)
    )


def _overridden(injection, name):
    arguments = dict(injection['method'])
    for pattern, changes in injection['targets'].get('overrides', {}).items():
        if re.search(pattern, name):
            spent = dict(budget=None) if 'rank' in changes and 'budget' in arguments else {}
            arguments |= spent | changes
    return METHODS.build(modern_arguments(arguments, VERSION))


def _matches(patterns, name):
    return any(re.search(pattern, name) for pattern in patterns)
