"""Regular expressions from files, which are searched for only if that is certain to be fast.

Python's ``re`` backtracks, and a search cannot be interrupted: a pattern of
a few characters can keep it busy for years.
"""

import re
from collections.abc import Iterable
from math import prod

from mmpeft.errors import UsageError

LONGEST = 500
"""Characters that a pattern may have."""

NAME = 60
"""Characters of a long module name, from which the steps of a search are estimated."""

MOST_STEPS = 2_000_000
"""Steps that the search for all patterns of a file in one name may take."""


def check_patterns(patterns: Iterable[str]) -> None:
    """Refuse patterns that are invalid or may be slow.

    Raises:
        UsageError: One is not a valid regular expression, or not certain to be fast.
    """
    steps = 0
    for pattern in sorted(set(patterns)):
        if len(pattern) <= LONGEST:
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise UsageError(
                    f'{pattern[:80]!r} is not a valid regular expression: {error}.'
                ) from error
        steps += _steps(pattern)
        if steps > MOST_STEPS:
            raise UsageError(
                f'The pattern {pattern[:80]!r} may take too long to search for. A pattern in a '
                f'file has at most {LONGEST} characters and two repetitions (*, +, ?, {{}}), and '
                'does not repeat a group.'
            )


def _steps(pattern):
    """Upper estimate of the steps of one search: infinite if a group is repeated."""
    if len(pattern) > LONGEST:
        return float('inf')
    bare = re.sub(r'\\.', 'x', pattern, flags=re.DOTALL)  # escapes and classes are one character
    bare = re.sub(r'\[\^?\]?[^\]]*\]', 'x', bare).replace('(?:', '(')
    if '(?' in bare or re.search(r'\)[*+?{]', bare):
        return float('inf')
    alternatives, open_groups = [], []
    for character in bare:
        if character == '(':
            open_groups.append(1)
        elif character == '|' and open_groups:
            open_groups[-1] += 1
        elif character == ')':
            alternatives.append(open_groups.pop())
    return prod(alternatives) * NAME ** (1 + len(re.findall(r'[*+?{]', bare)))
