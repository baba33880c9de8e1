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
from mmpeft.injection.insertion_points import Search
from mmpeft.injection.points import point_at
from mmpeft.injection.ranks import resolve_ranks
from mmpeft.injection.site import attached
from mmpeft.injection.targets import Targets, select, target_module
from mmpeft.injection.weights import ADAPTERS, layers, weights_of
from mmpeft.methods import ActivationMethod
from mmpeft.registry import METHODS, modern_arguments

from .manifest import check_number, list_adapters
from .plain_data import check, checked_method, refused
from .safe_patterns import check_patterns

VERSION = '0.3'
INJECTION = dict(method=dict, targets=dict, unfreeze=list[str])
MANIFEST = dict(version=str, torch=str, injections=[INJECTION], parameters=int, fingerprint=str)
SINCE_0_3 = ('torch', 'parameters')
TARGETS = dict(
    module=str,
    kinds=list[str] | None,
    exclude_kinds=list[str],
    include=list[str],
    exclude=list[str],
    overrides=dict[str, dict],
    max_share=float | None,
)


def is_former(manifest: Mapping) -> bool:
    """Whether a manifest is of mmpeft 0.2 or 0.3."""
    return 'adapters' not in manifest


def check_former(manifest: Mapping) -> None:
    """Refuse a manifest that those versions cannot have written.

    Raises:
        UsageError: The message says what is wrong.
    """
    check(manifest, MANIFEST, 'The manifest', optional=SINCE_0_3)
    check_number(manifest['injections'])
    for injection in manifest['injections']:
        method, targets = injection['method'], injection['targets']
        checked_method(method, VERSION)
        check(targets, TARGETS, 'The targets', optional=TARGETS)
        with refused(targets):
            Targets.of(targets)
        for changes in targets.get('overrides', {}).values():
            checked_method(method | changes, VERSION)


def upgraded(model: nn.Module, manifest: Mapping, state: Mapping[str, Tensor]) -> dict:
    """A manifest in the present format.

    Args:
        model: That the adapter is to be loaded into; is not changed.
        manifest: Checked by :func:`check_former`.
        state: Beside it; its keys say where activations are adapted.

    Raises:
        UsageError: The targets do not fit the model, or their patterns may be
            slow and are needed.
    """
    numbered, injections = [], []
    for number, injection in enumerate(manifest['injections']):
        method = _build(injection['method'])
        targets, unfreeze = _targets(injection, method), injection['unfreeze']
        if _are_fast(model, targets, unfreeze):
            sites = _select(model, method, targets, state)
            trained = _trained(target_module(model, targets.module), unfreeze)
        else:
            own = [site for site in attached(model) if site.adapter.injection == number]
            sites, trained = [replace(site, method=method) for site in own], []
        method = resolve_ranks(method, sites, targets.max_share)
        numbered += [(number, site) for site in sites]
        injections.append(dict(method=method.config(), module=targets.module, trained=trained))
    methods, adapters = list_adapters(numbered)
    found = dict(injections=injections, methods=methods, adapters=adapters)
    return dict(torch='', parameters=0) | dict(manifest) | found


def _build(config):
    return METHODS.build(modern_arguments(config, VERSION))


def _targets(injection, method):
    targets = Targets.of(injection['targets'])
    overrides = {
        pattern: {method.renamed.get(name, name): value for name, value in changes.items()}
        for pattern, changes in targets.overrides.items()
    }
    return replace(targets, overrides=overrides)


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


def _trained(root, patterns):
    names, trained = list(plain_parameters(root)), {}
    for pattern in patterns:
        found = [name for name in names if re.search(pattern, name)]
        if not found:
            raise UsageError(f'Its pattern {pattern!r} matches no parameter of the model.')
        trained |= dict.fromkeys(found)
    return list(trained)


def _select(model, method, targets, state):
    root = target_module(model, targets.module)
    if isinstance(method, ActivationMethod):
        targets = replace(targets, exclude=())  # what the keys have was not excluded
        found = _points(root, method, targets, state)
    else:  # new modules too, which now train by themselves
        weights = (
            (path, layer, *each) for path, layer in layers(root) for each in weights_of(layer)
        )
        found = [weight for weight in weights if method.accepts(weight[-1])]
    sites = select(model, method, targets, found)
    return [replace(site, method=_build(site.method.config())) for site in sites]


def _points(root, method, targets, state):
    """Insertion points at the modules that have adapters of activations in the state dict."""
    found = Search(root).find(*method.kinds).items()
    found = {path: point for path, point in found if method.accepts(point) and not point.ends}
    own, mark = dict(layers(root)), f'.{ADAPTERS}.'
    prefix = f'{targets.module}.' if targets.module else ''
    if method.tied:  # all that share a tensor, which is stored under the first one's key
        points = method.narrow(found)
    else:
        holders = {key.partition(mark)[0] for key in state if mark in key}
        holders = [key.removeprefix(prefix) for key in holders if key.startswith(prefix)]
        points = dict(_point_of(holder, own, found, method) for holder in holders)
    return [(path, layer, '', points[path]) for path, layer in own.items() if points.get(path)]


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
