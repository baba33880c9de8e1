"""Which weights and insertion points of a model a method adapts."""

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace

from torch import nn

from mmpeft.errors import UsageError, suggest
from mmpeft.methods import ActivationMethod, Method
from mmpeft.methods.arguments import check_types
from mmpeft.methods.spec import KINDS, POINT_KINDS
from mmpeft.registry import known_arguments

from .patterns import patterns_of
from .point_selection import points_for
from .site import Site
from .ties import holders
from .weights import is_below, join, layers, lineage, newly_initialized, weights_of


@dataclass(frozen=True, kw_only=True)
class Targets:
    """A selection of weights or insertion points below a module.

    Patterns are regular expressions searched for in the path below ``module``,
    such as ``stages_0.blocks.1.mlp.fc1.weight``.

    Attributes:
        module: Path of the target module; '' for the whole model.
        kinds: Of layers (:data:`mmpeft.methods.spec.KINDS`; a depthwise or 1x1 convolution is
            a ``conv`` too), or of insertion points (``POINT_KINDS``) for methods that act on
            activations; the method's own if None. With a single kind of insertion point, a
            pattern of ``include`` that matches none of those found by structure names the
            modules whose whole path it matches.
        exclude_kinds: Kinds to skip.
        include: Adapt only what matches one of these patterns. Without any, a weight that is
            also tied to a layer which is not selected is left out, with a warning.
        exclude: Skip what matches one of these patterns.
        overrides: Arguments of the method where a pattern matches, such as
            ``{'stages_3': dict(rank=64)}``; later ones win.
        max_share: Change the rank at a weight whose adapter has more than this fraction of
            the weight's parameters, to the largest adapter that has not, or the smallest.
    """

    module: str = ''
    kinds: tuple[str, ...] | None = None
    exclude_kinds: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    overrides: Mapping = field(default_factory=dict)
    max_share: float | None = None

    def __post_init__(self):
        for name in ('kinds', 'exclude_kinds'):
            value = getattr(self, name)
            if value is None and name != 'kinds':
                value = ()
            if value is not None:
                value = (value,) if isinstance(value, str) else value
            object.__setattr__(self, name, value)
        for name in ('include', 'exclude'):
            value = patterns_of(getattr(self, name), f'targets.{name}')
            object.__setattr__(self, name, value)
        object.__setattr__(self, 'overrides', self.overrides or {})
        check_types(self)
        patterns_of(self.overrides, 'targets.overrides')
        for pattern, changed in self.overrides.items():
            if not isinstance(changed, Mapping):
                raise UsageError(
                    f'targets.overrides[{pattern!r}]={changed!r} must be a dict of arguments of '
                    'the method, such as dict(rank=64).'
                )
        if self.max_share is not None and not self.max_share > 0:
            raise UsageError(f'targets: max_share={self.max_share} is not above 0.')
        known = KINDS + POINT_KINDS
        for kind in (self.kinds or ()) + self.exclude_kinds:
            if kind not in known:
                raise UsageError(f'targets: there is no kind {kind!r}. {suggest(kind, known)}')

    @classmethod
    def of(cls, config) -> 'Targets':
        """From a dict, a :class:`Targets` or None; refuses unknown keys."""
        if isinstance(config, cls):
            return config
        given, known = as_dict(config), [f.name for f in fields(cls)]
        for key in given:
            if key not in known:
                raise UsageError(f'targets has no key {key!r}. {suggest(key, known)}')
        return cls(**given)


def as_dict(targets: Mapping | None) -> dict:
    """Targets as a new dict, empty for None; raises :class:`UsageError` for what is no dict."""
    if targets is not None and not isinstance(targets, Mapping):
        raise UsageError(f"targets={targets!r} must be a dict, such as dict(module='backbone').")
    return dict(targets or {})


def target_module(model: nn.Module, path: str) -> nn.Module:
    """The module at a path; raises :class:`UsageError` if there is none."""
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        hint = suggest(path, [name for name, _ in model.named_modules() if name])
        message = f'targets.module={path!r} is not a module of {type(model).__name__}. {hint}'
        raise UsageError(message) from error


def select(
    model: nn.Module, method: Method, targets: Targets, found: Iterable | None = None
) -> list[Site]:
    """What a method adapts under the given targets: sites without adapters, in order.

    Args:
        model: With adapters or without.
        method: With the arguments that hold where no override does.
        targets: Of this method.
        found: Candidates to choose from, as (path, layer, tensor name, role); the name is '' for
            activations. If None, all that the method is defined on and that is not newly
            initialized.

    Raises:
        UsageError: Nothing is selected, or ties in part alone, a pattern matches nothing
            that the method is defined on, an override is not an argument of the method, or
            the network has no insertion point for it.
    """
    kinds = method.kinds if targets.kinds is None else targets.kinds
    below = targets.module or 'the model'
    patterns = targets.include + targets.exclude + tuple(targets.overrides)
    sites, names, seen = [], [], set()
    candidates = found
    if found is None:
        candidates = _candidates(model, method, targets)
    for path, layer, tensor, spec in candidates:
        name = join(path, tensor)
        names.append(name)
        of_kind = kinds is None or spec.kinds.intersection(kinds)
        if not of_kind or spec.kinds.intersection(targets.exclude_kinds):
            continue
        matched = {pattern for pattern in patterns if re.search(pattern, name)}
        seen |= matched
        is_included = not targets.include or matched.intersection(targets.include)
        if is_included and not matched.intersection(targets.exclude):
            chosen = _overridden(method, targets.overrides, matched)
            sites.append(Site(join(targets.module, path), layer, tensor, spec, chosen))
    for pattern in patterns:
        if pattern not in seen:
            raise UsageError(
                f'targets: the pattern {pattern!r} matches no weight or insertion point of kind '
                f'{_listed(kinds)} below {below!r}. {suggest(pattern, names)}'
            )
    if not sites and method.adapts:
        raise UsageError(
            f'targets: nothing below {below!r} is left for {type(method).__name__} to adapt: of '
            f'{len(names)} weights or insertion points that the method is defined on, none is of '
            f'kind {_listed(kinds)} and passes exclude_kinds, include and exclude of {targets}.'
        )
    return sites if found is not None or targets.include else _whole_ties(model, sites)


def _candidates(model, method, targets):
    root = target_module(model, targets.module)
    if isinstance(method, ActivationMethod):
        above = [model.get_submodule(path) for path in lineage(targets.module)[-2::-1]]
        points = points_for(root, method, targets.kinds, targets.include, above)
        for path, point in points.items():
            yield path, root.get_submodule(path), '', point
        return
    new = newly_initialized(root)
    for path, layer in layers(root):
        for tensor, spec in weights_of(layer):
            if method.accepts(spec) and not is_below(join(path, tensor), new):
                yield path, layer, tensor, spec


def _whole_ties(model, sites):
    """The sites without weights that are also held where none of the sites is; warns of these."""
    selected, held = {(site.layer, site.tensor) for site in sites}, holders(model)
    beside = {
        site: [join(p, name) for p, layer, name in held[site.tie_key] if layer is not site.layer]
        for site in sites
        if any((layer, name) not in selected for _, layer, name in held.get(site.tie_key, ()))
    }
    if beside:
        site, others = next(iter(beside.items()))
        message = (
            f'{len(beside)} of {len(sites)} weights are tied to what the targets leave out, and '
            f'are not adapted: {site.name} is also {" and ".join(others)}. To adapt a weight where '
            f'it is selected alone, name it in targets.include ({site.name!r}); to adapt it '
            'everywhere, let the targets select all its layers (targets.kinds, such as '
            "'embedding' beside 'linear')."
        )
        if len(beside) == len(sites):
            raise UsageError(message)
        warnings.warn(message, stacklevel=5)
    return [site for site in sites if site not in beside]


def _overridden(method, overrides, matched):
    for pattern in filter(matched.__contains__, overrides):
        where = f'targets.overrides[{pattern!r}]: '
        arguments = known_arguments(type(method), overrides[pattern], where)
        if arguments.get('budget') is not None:
            raise UsageError(
                f'{where}a budget is one for all adapters of a method. Write it in the method, or '
                'give a rank here.'
            )
        if 'rank' in arguments and hasattr(method, 'budget'):
            arguments = dict(budget=None) | arguments
        method = replace(method, **arguments)
    return method


def _listed(kinds):
    return 'any' if kinds is None else '/'.join(kinds)
