"""The manifest of an adapter: for each adapted weight or module its path and its method.

An adapter file has it in its metadata, a checkpoint in its ``meta``. It states
the result of :func:`mmpeft.inject`, not the search that led to it: adapters are
attached by path.
"""

import json
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from mmpeft.errors import UsageError
from mmpeft.injection.attach import adapt
from mmpeft.injection.freeze import Injection
from mmpeft.injection.guards import warn_of_replaced
from mmpeft.injection.points import restore_point
from mmpeft.injection.prompts import check_prompts
from mmpeft.injection.quantized import adopt_quantized
from mmpeft.injection.ranks import check_ranks
from mmpeft.injection.site import Site, adapter_parameters, attached, sites_at
from mmpeft.injection.targets import target_module
from mmpeft.injection.weights import is_below, join
from mmpeft.methods import ActivationMethod
from mmpeft.methods.delta import AUTO
from mmpeft.methods.spec import KINDS, POINT_KINDS
from mmpeft.version import __version__

from .fingerprint import fingerprint
from .plain_data import check, checked_method, parse, shorten

MOST_INJECTIONS = 1024
MANIFEST = dict(
    version=str,
    torch=str,
    injections=[dict(method=dict, module=str, trained=list[str])],
    methods=list[dict],
    adapters=list[dict],
    parameters=int,
    fingerprint=str,
)
WEIGHT = dict(path=str, tensor=str, method=int, injection=int)
POINT = dict(kinds=list[str], shape=list[int], axis=int, numel=int, first=bool, ends=list[str])


def describe(model: nn.Module) -> dict:
    """The manifest of an adapted model.

    Returns:
        Plain data:

        - ``version`` and ``torch``: the versions that wrote it.
        - ``injections``: for each its ``method`` as asked for, the target
          ``module``, and ``trained``, the names of the parameters below it
          that train themselves.
        - ``methods``: the distinct methods of adapters, with all arguments.
        - ``adapters``: for each adapter and each place that it is attached to,
          in the order of attaching, the ``path`` of the layer, the ``tensor``
          in it ('' for activations), the indices of its ``method`` and its
          ``injection``, and for activations the insertion ``point``.
        - ``parameters``: of all adapters.
        - ``fingerprint``: of the frozen base.

    Raises:
        UsageError: A combination of adapters cannot be described.
    """
    warn_of_replaced(model)
    methods, adapters = list_adapters((site.adapter.injection, site) for site in attached(model))
    injections = [
        dict(method=record.method.config(), module=record.module, trained=record.trained)
        for record in getattr(model, 'peft', [])
    ]
    manifest = dict(
        version=__version__,
        torch=str(torch.__version__),
        injections=injections,
        methods=methods,
        adapters=adapters,
        parameters=sum(p.numel() for p in adapter_parameters(model)),
        fingerprint=fingerprint(model),
    )
    check_number(injections)
    return parse(json.dumps(manifest))  # refuses what could not be read again


def list_adapters(sites: Iterable[tuple[int, Site]]) -> tuple[list[dict], list[dict]]:
    """``methods`` and ``adapters`` of a manifest, of sites each with its injection's index."""
    methods, adapters = [], []
    for injection, site in sites:
        method = site.method.config()
        if method not in methods:
            methods.append(method)
        point = {} if site.tensor else dict(point=site.spec.to_dict())
        indices = dict(method=methods.index(method), injection=injection)
        adapters.append(dict(path=site.path, tensor=site.tensor, **indices, **point))
    return methods, adapters


def attach_adapters(model: nn.Module, manifest: Mapping) -> None:
    """Adapt a plain model by a manifest; the adapters have no values yet.

    Args:
        model: Without adapters. When an error is raised, it can have some:
            call ``mmpeft.remove(model)``.
        manifest: Checked by :func:`check_manifest`.

    Raises:
        UsageError: The model lacks a module or weight, or a method is not
            defined on it.
    """
    version, modules = manifest['version'], dict(model.named_modules())
    methods = [checked_method(config, version) for config in manifest['methods']]
    for number, injection in enumerate(manifest['injections']):
        target_module(model, injection['module'])
        adopt_quantized(model, injection['module'])
        entries = []
        for entry in (entry for entry in manifest['adapters'] if entry['injection'] == number):
            path, point = entry['path'], None
            if not entry['tensor'] and path in modules:
                point = restore_point(modules[path], entry['point'])
            entries.append((path, entry['tensor'], methods[entry['method']], point))
        sites = sites_at(model, entries)
        check_ranks(sites)
        check_prompts(model, sites)
        method, trained = checked_method(injection['method'], version), injection['trained']
        adapt(model, Injection(method, injection['module'], tuple(trained)), sites, empty=True)


def check_manifest(manifest: Mapping) -> None:
    """Refuse a manifest from JSON that is not as :func:`describe` gives it.

    Methods are known with valid arguments, and indices in range. Whether a
    model has the paths is for :func:`attach_adapters` to say.

    Raises:
        UsageError: The message says what is wrong.
    """
    check(manifest, MANIFEST, 'The manifest')
    version, injections = manifest['version'], manifest['injections']
    check_number(injections)
    methods = [checked_method(method, version) for method in manifest['methods']]
    if any(getattr(method, 'budget', None) is not None for method in methods):
        raise UsageError('A method of the manifest has a budget in place of a rank.')
    if any(getattr(method, 'scale', None) == AUTO for method in methods):
        raise UsageError("A method of the manifest has scale='auto' in place of a number.")
    asked = [checked_method(injection['method'], version) for injection in injections]
    places = set()
    for entry in manifest['adapters']:
        form = WEIGHT | dict(point=POINT) if entry.get('tensor') == '' else WEIGHT
        check(entry, form, 'An adapter')
        if fault := _fault(entry, methods, asked, injections):
            name = shorten(join(entry['path'], entry['tensor']))
            raise UsageError(f'The adapter {name} {fault}.')
        places.add((entry['injection'], entry['path'], entry['tensor']))
    if len(places) < len(manifest['adapters']):
        raise UsageError('The manifest adapts a weight or module twice in one injection.')
    adapting = {number for number, method in enumerate(asked) if method.adapts}
    if adapting - {injection for injection, *_ in places}:
        raise UsageError('An injection of the manifest has no adapters.')


def check_number(injections: list) -> None:
    """Refuse a list of no or too many injections."""
    if not 1 <= len(injections) <= MOST_INJECTIONS:
        raise UsageError(
            f'The manifest has {len(injections)} injections, not 1 to {MOST_INJECTIONS}.'
        )


def _fault(entry, methods, asked, injections):
    """What is wrong with an entry of ``adapters``; None for nothing."""
    number, point = entry['injection'], entry.get('point')
    if not (0 <= entry['method'] < len(methods) and 0 <= number < len(asked)):
        return 'is of a method or an injection that the manifest does not have'
    method = methods[entry['method']]
    if type(method) is not type(asked[number]):
        return 'is of another method than its injection'
    if isinstance(method, ActivationMethod) is (point is None):
        return f'cannot be adapted by {type(method).__name__}'
    if not is_below(entry['path'], [injections[number]['module']]):
        return f'is not below {shorten(injections[number]["module"])}'
    if point is not None:
        valid = len(point['shape']) == 2 and min(*point['shape'], point['numel']) >= 0
        known = set(point['kinds']) <= {*KINDS, *POINT_KINDS}
        if not (valid and known and point['axis'] in (-1, 1)):
            return f'has the insertion point {shorten(point)}'
    return None
