"""The injections that the arguments of PEFTHook ask for, in order."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest

from torch import nn

from mmpeft.checkpoint import legacy
from mmpeft.checkpoint.plain_data import checked_method
from mmpeft.errors import UsageError
from mmpeft.injection.inject import inject
from mmpeft.injection.summary import Summary
from mmpeft.injection.targets import Targets
from mmpeft.methods import Method
from mmpeft.methods.delta import AUTO
from mmpeft.registry import METHODS

Methods = Method | Mapping | Sequence[Method | Mapping]


def injections(
    method: Methods,
    targets: Mapping | None = None,
    unfreeze: str | Sequence[str] = (),
) -> list[dict]:
    """Arguments of :func:`mmpeft.inject`, once for each method.

    Args:
        method: One, or a list of methods and of
            ``dict(method=..., targets=..., unfreeze=...)``.
        targets: Of all methods; a method's own are merged into them.
            ``module`` is ``'backbone'`` unless given.
        unfreeze: Of all methods without their own.

    Raises:
        UsageError: The list is empty, or a method, target or key is invalid.
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
        own = dict(module='backbone') | dict(targets or {}) | dict(entry.get('targets') or {})
        METHODS.build(entry['method'])  # raises for what is wrong
        Targets.of(own)
        unfrozen = entry.get('unfreeze', unfreeze)
        found.append(dict(method=entry['method'], targets=own, unfreeze=unfrozen))
    return found


def inject_all(
    model: nn.Module,
    given: Sequence[dict],
    manifest: Mapping | None = None,
    **execution: str | None,
) -> Summary:
    """Call :func:`mmpeft.inject` once for each of :func:`injections`.

    Args:
        model: Without adapters, on its base.
        given: From :func:`injections`.
        manifest: What a checkpoint that is loaded afterwards says of its
            adapters. The adapters stay empty until then, and arguments that
            ``given`` leaves open are those of the manifest.
        execution: ``execution``, ``memory`` and ``frozen_dtype`` of :func:`mmpeft.inject`.
    """
    stored = manifest['injections'] if manifest else ()
    for each, theirs in zip_longest(given, stored[: len(given)]):
        if theirs is not None and isinstance(each['method'], Mapping):
            version = legacy.VERSION if legacy.is_former(manifest) else manifest['version']
            theirs = checked_method(theirs['method'], version)
            each = each | dict(method=_followed(each['method'], theirs))
        summary = inject(model, **each, **execution, empty=manifest is not None)
    return summary


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
