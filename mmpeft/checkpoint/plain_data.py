"""Plain data from a file, checked before it reaches a model: JSON, types, methods."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from mmpeft.errors import UsageError, near
from mmpeft.methods import Method
from mmpeft.registry import METHODS, modern_arguments

LONGEST = 2**22
"""Characters that a manifest may have."""


def parse(text: str) -> dict:
    """A JSON object from its text, with finite numbers.

    Raises:
        UsageError: It is too long, or not such an object.
    """
    if len(text) > LONGEST:
        raise UsageError(f'The manifest has {len(text):,} characters, more than {LONGEST:,}.')
    try:
        data = json.loads(text, parse_constant=_number, parse_float=_number, parse_int=_number)
    except (ValueError, RecursionError) as error:
        raise UsageError(f'The manifest is not JSON: {error}.') from error
    if not isinstance(data, dict):
        raise UsageError(f'The manifest is {shorten(data)}, not an object.')
    return data


def check_fields(
    given: Any, types: Mapping[str, Any], what: str, optional: Iterable[str] = ()
) -> None:
    """Refuse data that is not a dict of certain keys with values of certain types.

    Args:
        given: From JSON.
        types: Type of the value by key, such as ``list[str]``.
        what: What to call it in errors, such as ``'An injection'``.
        optional: Keys that may be missing.

    Raises:
        UsageError: Keys are missing or unknown, or a value is of another type.
    """
    if not isinstance(given, dict):
        raise UsageError(f'{what} is {shorten(given)}.')
    missing, unknown = types.keys() - given.keys() - set(optional), given.keys() - types.keys()
    if missing or unknown:
        raise UsageError(
            f'{what} should have {", ".join(types)}; missing are {shorten(sorted(missing))} and '
            f'unknown {shorten(sorted(unknown))}.'
        )
    for key, value in given.items():
        if not _fits(value, types[key]):
            raise UsageError(f'{what} has {key}={shorten(value)}.')


def checked_method(given: Any, version: str) -> Method:
    """A method from its config.

    The name is looked up as it is: no name imports a module.

    Args:
        given: From JSON.
        version: The version of mmpeft that wrote it.

    Raises:
        UsageError: The method or an argument is unknown, or a value is invalid.
    """
    if not isinstance(given, dict) or not isinstance(given.get('type'), str):
        raise UsageError(f'The method is {shorten(given)}.')
    METHODS.import_from_location()
    name = given['type']
    if name not in METHODS.module_dict:  # METHODS.get would import a dotted name
        raise UsageError(f'There is no method {shorten(name)}. {near(name, METHODS.module_dict)}')
    with refused(given):
        return METHODS.build(modern_arguments(given, version))


@contextmanager
def refused(given: dict) -> Iterator[None]:
    """Raise a UsageError for whatever error data causes within the block."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # its type depends on the data
        raise UsageError(f'{shorten(given)} is invalid: {shorten(str(error))}.') from error


def shorten(value: Any) -> str:
    """The repr of a value, 80 characters at most."""
    text = repr(value)
    return text if len(text) <= 80 else f'{text[:76]} ...'


def _fits(value, hint) -> bool:
    """Whether a value from JSON is of a type; an integer passes as a number."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is UnionType:
        return any(_fits(value, choice) for choice in inner)
    if origin is list:
        return isinstance(value, list) and all(_fits(v, inner[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(v, inner[1]) for v in value.values())
    if hint in (int, float):
        kinds = int if hint is int else int | float
        return isinstance(value, kinds) and not isinstance(value, bool)
    return isinstance(value, NoneType if hint is None else hint)


def _number(text):
    """A finite number from its text."""
    if len(text) > 400 or not math.isfinite(value := float(text)):
        raise ValueError(f'{shorten(text)} is no finite number')
    return int(text) if text.lstrip('-').isdigit() else value
