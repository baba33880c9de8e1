"""Paths of modules below a root, whose own path is ''."""

from collections.abc import Iterable

from .weights import is_below


def lineage(path: str) -> list[str]:
    """The paths from the root's to a module's own."""
    parts = path.split('.') if path else []
    return ['.'.join(parts[:n]) for n in range(len(parts) + 1)]


def depth(path: str) -> int:
    """How many levels a path is below the root."""
    return path.count('.') + bool(path)


def below(path: str, top: str) -> str:
    """A path as it is below a module."""
    return path[len(top) :].removeprefix('.')


def within(paths: Iterable[str], top: str) -> list[str]:
    """Those of some paths that are at another or below it."""
    return [path for path in paths if is_below(path, [top])]


def smallest(found: dict) -> dict:
    """What was found at paths that have no other of them below."""
    outer = {above for path in found for above in lineage(path)[:-1]}
    return {path: value for path, value in found.items() if path not in outer}
