"""What is said when something was asked for that cannot be."""

from collections.abc import Iterable
from difflib import get_close_matches


class UsageError(ValueError):
    """What was asked for cannot be done; the text says what to write instead.

    The tools print the text alone, without a traceback.
    """


class MissingFileError(UsageError, FileNotFoundError):
    """A file that was named does not exist."""


class DamagedFileError(UsageError):
    """A file is not whole."""


class UnwrittenFileError(UsageError, OSError):
    """A file could not be written; what was there before is as it was."""


def near(name: str, known: Iterable[str], most: int = 3) -> str:
    """A hint such as ``Did you mean 'rank'?`` that ends an error message.

    Args:
        name: What was written.
        known: What could have been written.
        most: How many suggestions at the most.
    """
    known = list(known)
    by_lower = {k.lower(): k for k in known}
    close = get_close_matches(name.lower(), by_lower, most, 0.6)
    close = [by_lower[k] for k in close] or [k for k in known if name in k][:most]
    if close:
        return f'Did you mean {" or ".join(map(repr, close))}?'
    listed = ', '.join(map(repr, known[:12])) + (', ...' if len(known) > 12 else '')
    return f'There are {listed}.' if known else 'There are none.'
