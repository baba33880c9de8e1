"""What an adapter file says of itself, read as coming from a stranger.

A file can come from anywhere. Its description is taken for what it should be,
type by type, before any of it reaches a model.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import nn

from mmpeft.errors import UsageError, near
from mmpeft.injection.site import adapter_parameters
from mmpeft.injection.targets import Targets
from mmpeft.registry import METHODS
from mmpeft.version import __version__

from .fingerprint import fingerprint

LONGEST = 2**22
"""Characters that a description may have."""

MOST = 32
"""Injections that a description may name, one upon the other."""

KEYS = dict(version=str, torch=str, injections=list, parameters=int, fingerprint=str)
SINCE_0_3 = ('torch', 'parameters')


def describe(model: nn.Module) -> dict:
    """What an adapter has to say of itself: how it was injected, and on what.

    Args:
        model: After :func:`mmpeft.inject`.

    Returns:
        Plain data: ``version`` and ``torch``, ``injections``, ``parameters``
        of the adapters, and ``fingerprint``.
    """
    return dict(
        version=__version__,
        torch=str(torch.__version__),
        injections=[record.config() for record in getattr(model, 'peft', [])],
        parameters=sum(p.numel() for p in adapter_parameters(model)),
        fingerprint=fingerprint(model),
    )


def read_description(text: str) -> dict:
    """The description of an adapter from its JSON.

    Args:
        text: As :func:`describe` gives it, in JSON.

    Returns:
        The same plain data. Methods are known, and their arguments of the
        types that they declare.

    Raises:
        UsageError: It is something else; the text says what.
    """
    if len(text) > LONGEST:
        raise UsageError(f'The description has {len(text):,} characters, more than {LONGEST:,}.')
    try:
        description = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UsageError(f'The description is no JSON: {error}.') from error
    _check_keys(description, KEYS, 'The description', optional=SINCE_0_3)
    for key, value in description.items():
        if not _fits(value, KEYS[key]):
            raise UsageError(f'The description has {key}={_short(value)}.')
    if not 1 <= len(description['injections']) <= MOST:
        raise UsageError(
            f'The description names {len(description["injections"])} injections, not 1 to {MOST}.'
        )
    for injection in description['injections']:
        _check_injection(injection)
    return description


def _check_injection(injection):
    _check_keys(injection, ('method', 'targets', 'unfreeze'), 'An injection')
    if not _fits(injection['unfreeze'], tuple[str, ...]):
        raise UsageError(f'unfreeze={_short(injection["unfreeze"])} is no list of patterns.')
    method, targets = injection['method'], injection['targets']
    if not isinstance(method, dict) or not isinstance(method.get('type'), str):
        raise UsageError(f'The method is {_short(method)}.')
    METHODS.import_from_location()
    name = method['type']
    if name not in METHODS.module_dict:  # METHODS.get would import what has a dotted name
        raise UsageError(f'There is no method {_short(name)}. {near(name, METHODS.module_dict)}')
    kind = METHODS.module_dict[name]
    _check_arguments({k: v for k, v in method.items() if k != 'type'}, kind)
    _check_arguments(targets, Targets)
    for pattern, arguments in targets.get('overrides', {}).items():
        _check_arguments(arguments, kind, f' in targets.overrides[{_short(pattern)}]')
    try:
        METHODS.build(method)
        Targets.of(targets)
    except UsageError:
        raise
    except Exception as error:  # what is raised depends on the arguments
        raise UsageError(f'{_short(injection)} is no injection: {error}.') from error


def _check_arguments(given, kind, where=''):
    hints = _hints(kind)
    if not isinstance(given, dict):
        raise UsageError(f'The arguments of {kind.__name__}{where} are {_short(given)}.')
    for name, value in given.items():
        if name not in hints:
            raise UsageError(
                f'{kind.__name__} has no argument {_short(name)}{where}. {near(name, hints)}'
            )
        if not _fits(value, hints[name]):
            raise UsageError(f'{kind.__name__} has {name}={_short(value)}{where}.')


def _check_keys(given, known, what, optional=()):
    if not isinstance(given, dict):
        raise UsageError(f'{what} is {_short(given)}.')
    missing, unknown = set(known) - given.keys() - set(optional), given.keys() - set(known)
    if missing or unknown:
        raise UsageError(
            f'{what} should hold {", ".join(known)}; missing are {_short(sorted(missing))} and '
            f'unknown {_short(sorted(unknown))}.'
        )


@cache
def _hints(kind):
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _fits(value, hint) -> bool:
    """Whether a value from JSON is of a type; numbers pass for one another."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, choice) for choice in inner)
    if origin is Literal:
        return value in inner
    if origin is tuple:
        return isinstance(value, list) and all(_fits(v, inner[0]) for v in value)
    if origin in (dict, Mapping):
        return isinstance(value, dict) and all(_fits(v, inner[1]) for v in value.values())
    if hint in (int, float, bool):
        return isinstance(value, int | float) and _is_finite(value)
    return isinstance(value, NoneType if hint is None else hint)


def _is_finite(number):
    try:
        return math.isfinite(float(number))
    except OverflowError:
        return False


def _short(value):
    text = repr(value)
    return text if len(text) <= 80 else f'{text[:76]} ...'


def _refuse_constant(name):
    raise ValueError(f'{name} is no number')
