"""Patterns that select weights and parameters by name: regular expressions that users write."""

import re
from collections.abc import Iterable

from mmpeft.errors import UsageError, suggest


def patterns_of(given: str | Iterable[str] | None, where: str) -> tuple[str, ...]:
    """One pattern, several or None as a tuple of patterns.

    Args:
        given: What the user wrote.
        where: Of what argument, to begin messages with.

    Raises:
        UsageError: It is something else, or a pattern is empty or no regular expression.
    """
    found = (given,) if isinstance(given, str) or not isinstance(given, Iterable) else tuple(given)
    for pattern in () if given is None else found:
        if not isinstance(pattern, str):
            raise UsageError(f'{where}={given!r} must be a pattern, or a list of patterns.')
        if not pattern:
            raise UsageError(
                f"{where}: an empty pattern matches everything. Write '.' if everything is meant, "
                'or leave it out.'
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise UsageError(
                f'{where}: {pattern!r} is not a valid regular expression: {error}.'
            ) from error
    return () if given is None else found


def matching(
    names: Iterable[str], patterns: str | Iterable[str] | None, where: str, what: str
) -> list[str]:
    """The names that one of some patterns is found in, in their order.

    Args:
        names: Of what is selected from.
        patterns: As :func:`patterns_of` takes them.
        where: They were given, to begin messages with.
        what: The names are of, such as ``'parameter'``.

    Raises:
        UsageError: See :func:`patterns_of`; or a pattern matches no name.
    """
    names, patterns = list(names), patterns_of(patterns, where)
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            raise UsageError(f'{where}: {pattern!r} matches no {what}. {suggest(pattern, names)}')
    return [name for name in names if any(re.search(pattern, name) for pattern in patterns)]
