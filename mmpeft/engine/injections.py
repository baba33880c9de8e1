"""The injections that the arguments of PEFTHook ask for, in order."""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest

from torch import nn

from mmpeft.checkpoint import legacy
from mmpeft.checkpoint.plain_data import checked_method
from mmpeft.errors import UsageError
from mmpeft.injection.inject import inject
from mmpeft.injection.patterns import patterns_of
from mmpeft.injection.summary import Summary
from mmpeft.injection.targets import Targets, as_dict
from mmpeft.injection.weights import join
from mmpeft.methods import Method
from mmpeft.methods.arguments import has_type
from mmpeft.methods.delta import AUTO
from mmpeft.registry import METHODS

Methods = Method | Mapping | Sequence[Method | Mapping]


def injections(
    method: Methods,
    targets: Mapping | None = None,
    unfreeze: str | Sequence[str] = (),
    sensitivity: int = 0,
) -> list[dict]:
    """Arguments of :func:`mmpeft.inject`, once for each method.

    Args:
        method: One, or a list of methods and of
            ``dict(method=..., targets=..., unfreeze=...)``.
        targets: Of all methods; a method's own are merged into them.
            ``module`` is ``'backbone'`` unless given.
        unfreeze: Of all methods without their own.
        sensitivity: Batches on which it is measured for each method with a budget.

    Raises:
        UsageError: The list is empty, a method, target or key is invalid, or ``sensitivity`` is
            no number of batches, or has no method with a budget.
    """
    entries = method if isinstance(method, (list, tuple)) else [method]
    if not entries:
        raise UsageError("method=[] names no method. Write one, such as dict(type='LoRA', rank=4).")
    found = []
    for entry in entries:
        if not isinstance(entry, Mapping) or 'type' in entry:
            entry = dict(method=entry)
        if not {'method'} <= entry.keys() <= {'method', 'targets', 'unfreeze'}:
            raise UsageError(
                'An entry of a list of methods is a method, or dict(method=..., targets=..., '
                f'unfreeze=...), not {dict(entry)}.'
            )
        own = dict(module='backbone') | as_dict(targets) | as_dict(entry.get('targets'))
        built = METHODS.build(entry['method'])  # raises for what is wrong
        Targets.of(own)
        unfrozen = entry.get('unfreeze', unfreeze)
        patterns_of(unfrozen, 'unfreeze')
        method = entry['method']
        if isinstance(method, Mapping):  # whose type may be a class
            method = dict(method, type=type(built).__name__)
        found.append(dict(method=method, targets=own, unfreeze=unfrozen))
        if sensitivity and getattr(built, 'budget', None) is not None:
            found[-1]['sensitivity'] = sensitivity
    if not has_type(sensitivity, int) or sensitivity < 0:
        raise UsageError(f'sensitivity={sensitivity!r} is not a number of batches, such as 8.')
    if sensitivity and not any('sensitivity' in each for each in found):
        raise UsageError(
            f'sensitivity={sensitivity} distributes the budget of a method, and no method has one. '
            "Write method.budget='300k', say, in place of the rank, or leave sensitivity out."
        )
    return found


def with_rank(given: Sequence[dict], rank: int) -> list[dict]:
    """Those of :func:`injections` with another rank in place of a rank or budget.

    Raises:
        UsageError: A method has no rank.
    """
    return [each | dict(method=_with_rank(each['method'], rank)) for each in given]


def _with_rank(method, rank):
    config = method if isinstance(method, Mapping) else method.config()
    if not hasattr(METHODS.build(method), 'rank'):
        raise UsageError(f'--rank {rank}: {config["type"]} has no rank. Leave --rank out.')
    return dict(config, rank=rank, budget=None)


def inject_all(
    model: nn.Module,
    given: Sequence[dict],
    manifest: Mapping | None = None,
    measure: Callable[[dict], Mapping] | None = None,
    **execution: str | None,
) -> Summary:
    """Call :func:`mmpeft.inject` once for each of :func:`injections`.

    Args:
        model: Without adapters, on its base.
        given: From :func:`injections`.
        manifest: What a checkpoint that is loaded afterwards says of its
            adapters. The adapters stay empty until then, and arguments that
            ``given`` leaves open are those of the manifest, and so are ranks by sensitivity.
        measure: Gives the sensitivity for one of ``given`` that asks for it, on the plain model.
            Without it, and without a manifest, a budget gives one rank for all.
        execution: ``execution``, ``memory`` and ``frozen_dtype`` of :func:`mmpeft.inject`.
    """
    stored = manifest['injections'] if manifest else ()
    given = [_measured(each, None if manifest else measure) for each in given]
    for number, (each, theirs) in enumerate(zip_longest(given, stored[: len(given)])):
        if theirs is not None and isinstance(each['method'], Mapping):
            version = legacy.VERSION if legacy.is_former(manifest) else manifest['version']
            theirs = checked_method(theirs['method'], version)
            same = type(theirs).__name__ == each['method']['type']
            if 'sensitivity' in each and same and not legacy.is_former(manifest):
                each = _with_ranks(each, manifest, number)
            each = each | dict(method=_followed(each['method'], theirs))
        summary = inject(model, **each, **execution, empty=manifest is not None)
    return summary


def _measured(given, measure):
    """An injection with its sensitivity, None where nothing measures, in place of batches."""
    if 'sensitivity' not in given:
        return given
    return given | dict(sensitivity=measure(given) if measure else None)


def _with_ranks(given, manifest, number):
    """An injection with the ranks that a manifest has for each weight, in place of a budget."""
    module, names = given['targets']['module'], defaultdict(list)
    for entry in manifest['adapters']:
        if entry['injection'] == number:
            rank = manifest['methods'][entry['method']]['rank']
            name = join(entry['path'], entry['tensor']).removeprefix(f'{module}.')
            names[tuple(rank) if isinstance(rank, list) else rank].append(re.escape(name))
    ranks = {f'^({"|".join(same)})$': dict(rank=rank) for rank, same in names.items()}
    overrides = {**(given['targets'].get('overrides') or {}), **ranks}
    method = {key: value for key, value in given['method'].items() if key != 'budget'}
    return given | dict(method=method, targets={**given['targets'], 'overrides': overrides})


def _followed(method, theirs):
    """A method whose open arguments are those of a checkpoint, whatever the present defaults."""
    if type(theirs).__name__ != method['type']:
        return method
    method = {name: value for name, value in method.items() if value != AUTO}  # theirs is a number
    given = {getattr(theirs, 'renamed', {}).get(name, name) for name in method}
    if 'budget' in given:
        given.add('rank')
    if given & {'scale', 'alpha'}:
        given |= {'scale', 'alpha'}
    given |= {'dropout', 'budget'}  # of training alone
    return {k: v for k, v in theirs.config().items() if k not in given} | dict(method)
