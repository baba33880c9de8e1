"""Which insertion points a method on activations uses: found by structure, or named by the user."""

import re
import warnings
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from mmpeft.errors import UsageError
from mmpeft.methods import ActivationMethod
from mmpeft.methods.spec import POINT_DESCRIPTIONS, POINT_KINDS, InsertionPoint
from mmpeft.registry import METHODS

from .insertion_points import Search
from .paths import lineage, within
from .points import point_at
from .weights import is_below, newly_initialized


def points_for(
    root: nn.Module,
    method: ActivationMethod,
    kinds: Sequence[str] | None = None,
    include: Sequence[str] = (),
) -> dict[str, InsertionPoint]:
    """All insertion points that a method could use below a module, by path.

    Warns where blocks have attention and no MLP was found, or the reverse.

    Args:
        root: With or without adapters.
        method: The method.
        kinds: Asked for by the user, if any.
        include: Patterns of paths. With a single kind, a pattern that none of the points found
            matches names the modules whose whole path it matches, whatever their structure is.

    Raises:
        UsageError: There is none, or a module that was named cannot be one.
    """
    search, new, found = Search(root), newly_initialized(root), {}
    for kind in method.kinds:
        found = search.find(kind) | found
    if kinds and len(kinds) == 1 and kinds[0] in method.kinds:
        found |= _named(search, kinds[0], include)
    points = {
        path: found[path]
        for path in search.modules
        if path in found and method.accepts(found[path]) and not is_below(path, new)
    }
    if not points:
        raise UsageError(_no_point(search, method, type(root).__name__))
    unpaired = _unpaired(search, set(method.kinds).intersection(kinds or method.kinds))
    if unpaired:
        there, path, missing = unpaired
        warnings.warn(
            f'{type(root).__name__} has {there}, such as {path!r}, where no {missing} '
            f'({POINT_DESCRIPTIONS[missing]}) was found, so that {type(method).__name__} adapts '
            f'none there. Name such modules with targets=dict(kinds={missing!r}, include=...), '
            'with patterns of their whole paths.',
            stacklevel=5,
        )
    asked = {path: point for path, point in points.items() if point.kinds & set(kinds or ())}
    return method.narrow(asked or points)


def _named(search, kind, include):
    found = search.find(kind)
    unmatched = [p for p in include if not any(re.search(p, path) for path in found)]
    points = {
        path: point_at(module, kind)
        for path, module in search.modules.items()
        if any(re.fullmatch(pattern, path) for pattern in unmatched)
    }
    first = next(iter(points), None) if not found else None
    return {path: replace(point, first=path == first) for path, point in points.items()}


def _unpaired(search, wanted):
    """Attention without an MLP, or the reverse: its kind and path, and the kind missing."""
    after = [*search.mlp, *search.branch]
    for path in search.attention if 'mlp' in wanted else ():
        for top in lineage(path)[:-1]:
            several = len(within(search.attention, top)) > (3 if top else 1)
            if several and not within(after, top):
                return 'attention', path, 'mlp'
    before = search.attention or search.mixer or search.branch
    if 'attention' in wanted and len(search.mlp) > 1 and not before:
        return 'mlp', next(iter(search.mlp)), 'attention'
    return None


def _no_point(search, method, network):
    counts = {kind: len(search.find(kind)) for kind in POINT_KINDS}
    found = [f'{number} {kind!r}' for kind, number in counts.items() if number]
    fitting = [
        name
        for name, other in METHODS.module_dict.items()
        if issubclass(other, ActivationMethod) and any(counts[kind] for kind in other.kinds)
    ]
    wanted = ' or '.join(f'{kind!r} ({POINT_DESCRIPTIONS[kind]})' for kind in method.kinds)
    return (
        f'{type(method).__name__} acts at insertion points of kind {wanted}, and {network} has '
        f'none. It has {", ".join(found) or "no insertion point of any kind"}. '
        + (f'{", ".join(fitting)} would fit, and so would m' if fitting else 'M')
        + 'ethods on weights, such as LoRA. Or name modules with '
        f"targets=dict(kinds={method.kinds[0]!r}, include='their.whole.path')."
    )
