"""Plain data from a file, checked before it reaches a model: JSON, types, methods."""

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from mmpeft.errors import UsageError, suggest
from mmpeft.methods import Method
from mmpeft.methods.arguments import has_type
from mmpeft.registry import METHODS, modern_arguments

LONGEST = 2**25
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


def check(given: Any, form: Any, what: str, optional: Iterable[str] = ()) -> None:
    """Refuse data from JSON that is not of a form.

    Args:
        given: The data.
        form: A type, such as ``list[str] | None``; ``[form]`` for a list of that form; or
            ``{key: form}`` for a dict with these keys.
        what: What to call the data in errors.
        optional: Keys that the dict may lack.

    Raises:
        UsageError: The message names the first part that is of another form.
    """
    if isinstance(form, dict) and isinstance(given, dict):
        wrong = (form.keys() ^ given.keys()) - (set(optional) - given.keys())
        if wrong:
            raise UsageError(
                f'{what} should have {", ".join(form)}; missing or unknown are '
                f'{shorten(sorted(wrong))}.'
            )
        for key, value in given.items():
            check(value, form[key], f'{what}: {key}')
    elif isinstance(form, list) and isinstance(given, list):
        for number, value in enumerate(given):
            check(value, form[0], f'{what} {number}')
    elif isinstance(form, dict | list) or not has_type(given, form):
        raise UsageError(f'{what} is {shorten(given)}.')


def checked_method(given: Any, version: str) -> Method:
    """A method from its config in a file that a version of mmpeft wrote.

    The name is looked up as it is: no name imports a module.

    Raises:
        UsageError: The method or an argument is unknown, or a value is invalid.
    """
    if not isinstance(given, dict) or not isinstance(given.get('type'), str):
        raise UsageError(f'The method is {shorten(given)}.')
    METHODS.import_from_location()
    name = given['type']
    if name not in METHODS.module_dict:  # METHODS.get would import a dotted name
        raise UsageError(
            f'There is no method {shorten(name)}. {suggest(name, METHODS.module_dict)}'
        )
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


def _number(text):
    """A finite number from its text."""
    if len(text) > 400 or not math.isfinite(value := float(text)):
        raise ValueError(f'{shorten(text)} is not a finite number')
    return int(text) if text.lstrip('-').isdigit() else value
