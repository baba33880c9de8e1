"""Checking plain data from a file: types, known names, methods with their arguments.

Nothing of a file reaches a model before it was checked here. A method is
looked up in its registry by its bare name, so that no name imports a module.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mmpeft.errors import UsageError, near
from mmpeft.methods import Method
from mmpeft.registry import METHODS, modern_arguments

LONGEST = 2**22
"""Characters that a manifest may have."""


def parse(text: str) -> dict:
    """A JSON object from its text.

    Raises:
        UsageError: It is too long, or is none.
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


def check_arguments(given: Any, kind: type, where: str = '') -> None:
    """Refuse data that is not a dict of fields of a dataclass.

    Args:
        given: From JSON.
        kind: The dataclass.
        where: End of the sentence in errors, such as ``' in targets.overrides'``.

    Raises:
        UsageError: A name is unknown, or a value is of another type.
    """
    hints = _hints(kind)
    if not isinstance(given, dict):
        raise UsageError(f'The arguments of {kind.__name__}{where} are {shorten(given)}.')
    for name, value in given.items():
        if name not in hints:
            raise UsageError(
                f'{kind.__name__} has no argument {shorten(name)}{where}. {near(name, hints)}'
            )
        if not _fits(value, hints[name]):
            raise UsageError(f'{kind.__name__} has {name}={shorten(value)}{where}.')


def checked_method(given: Any, version: str) -> Method:
    """A method from its config.

    Args:
        given: From JSON.
        version: Of mmpeft that wrote it.

    Raises:
        UsageError: The method or an argument is unknown, or a value is invalid.
    """
    if not isinstance(given, dict) or not isinstance(given.get('type'), str):
        raise UsageError(f'The method is {shorten(given)}.')
    METHODS.import_from_location()
    name = given['type']
    if name not in METHODS.module_dict:  # METHODS.get would import a dotted name
        raise UsageError(f'There is no method {shorten(name)}. {near(name, METHODS.module_dict)}')
    return built(lambda config: METHODS.build(modern_arguments(config, version)), given)


def built(build, given: dict):
    """What a function makes of checked data.

    Raises:
        UsageError: The function raised an error of any kind.
    """
    try:
        return build(given)
    except UsageError:
        raise
    except Exception as error:  # its type depends on the data
        raise UsageError(f'{shorten(given)} is invalid: {shorten(str(error))}.') from error


def shorten(value: Any) -> str:
    """The repr of a value, 80 characters at most."""
    text = repr(value)
    return text if len(text) <= 80 else f'{text[:76]} ...'


@cache
def _hints(kind):
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _fits(value, hint) -> bool:
    """Whether a value from JSON is of a type; integers and other numbers pass for one another."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, choice) for choice in inner)
    if origin is Literal:
        return value in inner
    if origin in (list, tuple):
        return isinstance(value, list) and all(_fits(v, inner[0]) for v in value)
    if origin in (dict, Mapping):
        return isinstance(value, dict) and all(_fits(v, inner[1]) for v in value.values())
    if hint in (int, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, NoneType if hint is None else hint)


def _number(text):
    """A finite number from its text."""
    if len(text) > 400 or not math.isfinite(value := float(text)):
        raise ValueError(f'{shorten(text)} is no finite number')
    return int(text) if text.lstrip('-').isdigit() else value
