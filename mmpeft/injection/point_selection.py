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
from .points import point_at
from .weights import is_below, lineage, newly_initialized, within


def points_for(
    root: nn.Module,
    method: ActivationMethod,
    kinds: Sequence[str] | None = None,
    include: Sequence[str] = (),
    above: Sequence[nn.Module] = (),
) -> dict[str, InsertionPoint]:
    """All insertion points that a method could use below a module, by path.

    Warns where blocks have attention and no MLP was found, or the reverse, and where a method
    that acts between the two does not find the place. ``kinds`` and
    ``include`` are those of :class:`~mmpeft.injection.targets.Targets`; ``above`` are the modules
    that hold ``root``, from the inner to the outer.

    Raises:
        UsageError: There is none, or a module that was named cannot be one.
    """
    search, new = Search(root, above), newly_initialized(root)
    found = search.find(*method.kinds)
    if kinds and len(kinds) == 1 and kinds[0] in method.kinds:
        found |= _named(search, kinds[0], include)
    points = {
        path: found[path]
        for path in search.modules
        if path in found and method.accepts(found[path]) and not is_below(path, new)
    }
    network, name = type(root).__name__, type(method).__name__
    if not points:
        raise UsageError(_no_point(search, method, network))
    for there, path, missing in _unpaired(search):
        if missing in method.kinds and missing in (kinds or method.kinds):
            warnings.warn(
                f'{network} has {there}, such as {path!r}, where no {missing} '
                f'({POINT_DESCRIPTIONS[missing]}) was found, so {name} skips them. '
                + _name_modules(missing),
                stacklevel=6,
            )
            break
    asked = {path: point for path, point in points.items() if point.kinds & set(kinds or ())}
    chosen = method.narrow(asked or points)
    _warn_of_undivided(search, chosen, name)
    return chosen


def _warn_of_undivided(search, points, name):
    """Blocks with attention that have no place between it and the MLP."""
    paths = [path for path, point in points.items() if 'block' in point.kinds and not point.ends]
    paths = [path for path in paths if within(search.attention, path)]
    if paths:
        warnings.warn(
            f'{len(paths)} blocks with attention, such as {paths[0]!r}, do not have exactly two '
            f'norms of their own, so the place between attention and MLP is unknown: {name} '
            'acts only at their ends. Leave such blocks out with targets.exclude, or filter this '
            'warning.',
            stacklevel=7,
        )


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


def _unpaired(search):
    """Kind and path of attention without an MLP, or the reverse, and the kind missing."""
    for path in search.attention:
        for top in lineage(path)[:-1]:
            several = len(within(search.attention, top)) > (3 if top else 1)
            if several and not within([*search.mlp, *search.branch], top):
                yield 'attention', path, 'mlp'
    if len(search.mlp) > 1 and not (search.attention or search.mixer or search.branch):
        yield 'mlp', next(iter(search.mlp)), 'attention'


def _no_point(search, method, network):
    counts = {kind: len(search.find(kind)) for kind in POINT_KINDS}
    found = [f'{number} {kind!r}' for kind, number in counts.items() if number]
    fitting = ['Methods on weights, such as LoRA,']
    for name, other in METHODS.module_dict.items():
        if issubclass(other, ActivationMethod) and any(counts[kind] for kind in other.kinds):
            fitting.append(name)
    wanted = ' or '.join(f'{kind!r} ({POINT_DESCRIPTIONS[kind]})' for kind in method.kinds)
    return (
        f'{type(method).__name__} acts at insertion points of kind {wanted}, and {network} has '
        f'none. It has {", ".join(found) or "no insertion point of any kind"}. '
        f'{" or ".join(fitting)} would fit. {_name_modules(method.kinds[0])}'
    )


def _name_modules(kind):
    return f"You can name modules with targets=dict(kinds={kind!r}, include='their.whole.path')."
