"""Checks of the arguments of methods, and of other dataclasses that users fill in."""

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from math import inf
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mmpeft.errors import UsageError

NAMES = {
    int: 'one integer',
    float: 'a finite number',
    bool: 'True or False',
    str: 'a string',
    NoneType: 'None',
    tuple[int, ...]: 'a tuple of integers',
    tuple[str, ...]: 'a tuple of strings',
    Mapping: 'a dict',
}


def require(method: Any, name: str, holds: bool, rule: str) -> None:
    """Raise UsageError unless a rule of the argument ``name`` holds.

    ``rule`` ends the message, such as ``'must be positive.'``.
    """
    if not holds:
        value = getattr(method, name)
        raise UsageError(f'{type(method).__name__}: {name}={value!r} {rule}')


def check_types(method: Any) -> None:
    """Raise UsageError unless each argument has the type of its field; lists become tuples."""
    for name, hint in types_of(type(method)).items():
        value = getattr(method, name)
        if isinstance(value, list):
            value = tuple(value)
            object.__setattr__(method, name, value)
        require(method, name, has_type(value, hint), _rule(hint))


def check_ranges(method: Any) -> None:
    """Raise UsageError where a factor starts dead for good, or a penalty is a reward."""
    for name in types_of(type(method)):
        value = getattr(method, name)
        if name == 'scale' and value == 0:
            require(method, name, False, 'would leave the weights as they are.')
        if name == 'init_std' and value is not None:
            require(method, name, value > 0, 'must be above 0.')
        if name in ('mpc_weight', 'orthogonality', 'l0_weight'):
            require(method, name, value >= 0, 'must not be below 0.')


@cache
def types_of(method: type) -> dict[str, Any]:
    """The types of a method's arguments, by name."""
    hints = get_type_hints(method)
    return {field.name: hints[field.name] for field in fields(method)}


def has_type(value: Any, hint: Any) -> bool:
    """Whether a value is of a type; an integer passes as a number, True and False do not."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(has_type(value, choice) for choice in inner)
    if origin is Literal:
        return value in inner
    if origin in (tuple, list):
        return isinstance(value, origin) and all(has_type(v, inner[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(has_type(v, inner[1]) for v in value.values())
    if hint in (int, float):
        kind = int if hint is int else int | float
        return isinstance(value, kind) and not isinstance(value, bool) and -inf < value < inf
    kind = origin or hint
    return hint is Any or not isinstance(kind, type) or isinstance(value, kind)


def _rule(hint):
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if all(get_origin(kind) is Literal or kind is NoneType for kind in kinds):
        choices = [c for kind in kinds for c in get_args(kind) or (None,)]
        return f'is unknown. Write one of {", ".join(map(repr, choices))}.'
    return f'must be {" or ".join(map(_name, kinds))}.'


def _name(kind):
    if get_origin(kind) is Literal:
        return ' or '.join(map(repr, get_args(kind)))
    return NAMES.get(kind) or getattr(kind, '__name__', str(kind))
