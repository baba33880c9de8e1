"""The errors that mmpeft raises on purpose, each with one paragraph that a user can act on.

The tools print the paragraph alone, without a traceback.
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class UsageError(ValueError):
    """The user asked for something invalid; the message says what to write instead."""


class MissingFileError(UsageError, FileNotFoundError):
    """A file that the user named does not exist."""


class DamagedFileError(UsageError):
    """A file that the user named is truncated or corrupted."""


class TrainingError(RuntimeError):
    """A run went wrong: the loss diverged, frozen weights moved, processes disagree."""


class UnwrittenFileError(OSError):
    """A file could not be written; what was at its path before is unchanged."""


def suggest(name: str, known: Iterable[str], most: int = 3, otherwise: str | None = None) -> str:
    """The sentence that ends a message about an unknown name, such as ``Did you mean 'rank'?``.

    Args:
        name: What the user wrote.
        known: The valid names.
        most: Number of suggestions at most.
        otherwise: The sentence where none is similar; None for one with the valid names.

    Returns:
        Similar names, or else the valid names.
    """
    known = list(known)
    by_lower = {k.lower(): k for k in known}
    close = get_close_matches(name.lower(), by_lower, most, 0.6)
    close = [by_lower[k] for k in close] or [k for k in known if name in k][:most]
    if close:
        return f'Did you mean {" or ".join(map(repr, close))}?'
    if otherwise is not None:
        return otherwise
    if not known:
        return 'The list of valid names is empty.'
    return f'Valid names are {listed(known, 12)}.'


def listed(names: Sequence, most: int = 3) -> str:
    """The first of many names, for a message."""
    return ', '.join(map(repr, names[:most])) + (', ...' if len(names) > most else '')
