"""Regular expressions from a stranger: matched elsewhere first, for a limited time.

Python's ``re`` goes back over what it tried, which can take longer than anyone
waits, and cannot be stopped within a process.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterable

from mmpeft.errors import UsageError

LIMIT = 10.0
"""Seconds that patterns may take on all names of a model."""

SEARCH = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    for name in names:
        re.search(pattern, name)
"""


def check_patterns(patterns: Iterable[str], names: Iterable[str]) -> None:
    """Refuse patterns that are none, or that take too long.

    A pattern with at most one repetition or alternative takes at most
    quadratic time, and is not tried.

    Args:
        patterns: Regular expressions.
        names: What they are to be searched for in.

    Raises:
        UsageError: One is no regular expression, or they take longer than
            ``LIMIT`` on the names.
    """
    patterns = sorted(set(patterns))
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise UsageError(f'{pattern[:80]!r} is no regular expression: {error}.') from error
    slow = [pattern for pattern in patterns if len(re.findall(r'[*+?{|]', pattern)) > 1]
    if not slow:
        return
    try:
        subprocess.run(
            [sys.executable, '-I', '-S', '-c', SEARCH],
            input=json.dumps([slow, sorted(names)]).encode(),
            timeout=LIMIT,
            check=True,
            capture_output=True,
        )
    except subprocess.TimeoutExpired as error:
        raise UsageError(
            f'The patterns {", ".join(repr(p[:80]) for p in slow[:3])} take longer than '
            f'{LIMIT:g} s to search the names of this model.'
        ) from error
