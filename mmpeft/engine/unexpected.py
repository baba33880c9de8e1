"""The key of an argument in a config that what it builds does not have."""

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager

from mmengine.config import Config
from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS, TRANSFORMS

from mmpeft.errors import UsageError, suggest

from .config import class_name, type_name

MESSAGE = re.compile(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'")
"""What Python says of it, with the class that was called last."""


@contextmanager
def naming_arguments(cfg: Config) -> Iterator[None]:
    """Name the key where building parts of a config fails at an unknown argument.

    Raises:
        UsageError: In place of Python's TypeError.
    """
    try:
        yield
    except TypeError as error:
        match = MESSAGE.search(str(error))
        nodes = list(_having(cfg.to_dict(), match[2], '')) if match else []
        named = [(key, n) for key, n in nodes if class_name(n) == match[1]]
        for key, node in (named or nodes)[:1]:
            kind, name = type_name(node), match[2]
            hint = suggest(name, _arguments(kind), otherwise='')
            fault = f'{key}.{name}: {kind} has no argument {name!r} ({error}). {hint}'
            raise UsageError(fault.rstrip()) from error
        raise


def _having(node, name, path) -> Iterator[tuple[str, dict]]:
    """The dicts of something to build that have a key, with their own."""
    if isinstance(node, dict):
        if name in node and 'type' in node:
            yield path, node
        node = node.items()
    elif isinstance(node, (list, tuple)):
        node = enumerate(node)
    else:
        return
    for key, value in node:
        yield from _having(value, name, f'{path}.{key}'.lstrip('.'))


def _arguments(type_name) -> set[str]:
    kind = object
    for registry in (MODELS, DATASETS, TRANSFORMS, HOOKS, METRICS):
        with registry.switch_scope_and_registry(None) as scoped:
            found = scoped.get(type_name)
        kind = found if inspect.isclass(found) else kind
    bases = [base for base in kind.__mro__ if '__init__' in vars(base) and base is not object]
    return {name for base in bases for name in inspect.signature(base.__init__).parameters}
