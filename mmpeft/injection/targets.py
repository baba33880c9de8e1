"""Which weights and places of a model are adapted."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace

from torch import nn

from mmpeft.errors import UsageError, near
from mmpeft.methods import ActivationMethod, Method
from mmpeft.methods.spec import KINDS, POINT_DESCRIPTIONS, POINT_KINDS, InsertionPoint, WeightSpec
from mmpeft.registry import METHODS, known_arguments

from .insertion_points import insertion_points
from .site import Site
from .weights import is_below, join, layers, newly_initialized, weights_of


@dataclass(frozen=True, kw_only=True)
class Targets:
    """A selection of weights or places below a sub-module.

    Patterns are regular expressions searched for in a weight's path below
    ``module``, such as ``stages_0.blocks.1.mlp.fc1.weight``.

    Attributes:
        module: Path of the sub-module; '' for the whole model.
        kinds: Kinds of layers, of ``conv``, ``depthwise``, ``pointwise``,
            ``linear``, ``embedding``, ``norm``; the method's own if None.
            A depthwise or 1x1 convolution is a ``conv`` too. Methods that
            act on activations have kinds of places instead
            (:data:`mmpeft.injection.insertion_points.POINT_KINDS`).
        exclude_kinds: Kinds that are left out.
        include: Keep only weights that match one of these patterns.
        exclude: Leave out weights that match one of these.
        overrides: Arguments of the method for the weights that match a
            pattern, e.g. ``{'stages_3': dict(rank=64)}``; later ones win.
        max_share: Lower the rank of a weight until its adapter has at most
            this share of the weight's parameters (or rank 1 is reached).
    """

    module: str = ''
    kinds: tuple[str, ...] | None = None
    exclude_kinds: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    overrides: dict[str, dict] = field(default_factory=dict)
    max_share: float | None = None

    def __post_init__(self):
        for name in ('kinds', 'exclude_kinds', 'include', 'exclude'):
            value = getattr(self, name)
            if value is not None:
                value = (value,) if isinstance(value, str) else tuple(value)
            object.__setattr__(self, name, value)
        known = KINDS + POINT_KINDS
        for kind in (self.kinds or ()) + self.exclude_kinds:
            if kind not in known:
                raise UsageError(f'targets: there is no kind {kind!r}. {near(kind, known)}')
        for pattern in self.include + self.exclude + tuple(self.overrides):
            try:
                re.compile(pattern)
            except re.error as error:
                raise UsageError(
                    f'targets: {pattern!r} is no regular expression: {error}.'
                ) from error

    @classmethod
    def of(cls, config) -> 'Targets':
        """From a dict, a :class:`Targets` or None.

        Raises:
            UsageError: The dict has an unknown key.
        """
        if isinstance(config, cls):
            return config
        known = [f.name for f in fields(cls)]
        for key in config or {}:
            if key not in known:
                raise UsageError(f'targets has no key {key!r}. {near(key, known)}')
        return cls(**(config or {}))


def target_module(model: nn.Module, path: str) -> nn.Module:
    """The sub-module at a path.

    Raises:
        UsageError: There is none.
    """
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        paths = [name for name, _ in model.named_modules() if name]
        raise UsageError(
            f'targets.module={path!r} is no sub-module of {type(model).__name__}. '
            f'{near(path, paths)}'
        ) from error


def select(model: nn.Module, method: Method, targets: Targets) -> list[Site]:
    """The weights that a method adapts under the given targets.

    Raises:
        UsageError: A pattern or kind matches no weight that the method is
            defined on, or an override is no argument of the method.
    """
    kinds = method.kinds if targets.kinds is None else targets.kinds
    root = target_module(model, targets.module)
    sites, names, seen = [], [], set()
    for path, layer, tensor, spec in candidates(root, method):
        name = join(path, tensor)
        names.append(name)
        if kinds is not None and not spec.kinds.intersection(kinds):
            continue
        if spec.kinds.intersection(targets.exclude_kinds):
            continue
        seen.update(p for p in _patterns(targets) if re.search(p, name))
        if targets.include and not _matches(targets.include, name):
            continue
        if _matches(targets.exclude, name):
            continue
        chosen = _overridden(method, targets.overrides, name)
        sites.append(Site(join(targets.module, path), layer, tensor, spec, chosen))
    for pattern in _patterns(targets):
        if pattern not in seen:
            raise UsageError(
                f'targets: the pattern {pattern!r} matches no weight or place of kind '
                f'{_listed(kinds)} below {targets.module or "the model"!r}. {near(pattern, names)}'
            )
    if not sites and method.adapts:
        raise UsageError(
            f'targets: nothing below {targets.module or "the model"!r} is left for '
            f'{type(method).__name__} to adapt. It holds {len(names)} weights or places that the '
            f'method is defined on; kinds={_listed(kinds)}, exclude_kinds={targets.exclude_kinds}, '
            f'include={targets.include}, exclude={targets.exclude} leave none.'
        )
    return sites


def candidates(
    root: nn.Module, method: Method
) -> Iterator[tuple[str, nn.Module, str, WeightSpec | InsertionPoint]]:
    """All that a method could adapt below a module, without what is newly initialized there.

    Yields:
        Path of the layer, the layer, name of the weight in it ('' for activations), and its role.

    Raises:
        UsageError: The method acts on activations, and there is no insertion point for it.
    """
    new = newly_initialized(root)
    if not isinstance(method, ActivationMethod):
        for path, layer in layers(root):
            for tensor, spec in weights_of(layer):
                if method.accepts(spec) and not is_below(join(path, tensor), new):
                    yield path, layer, tensor, spec
        return
    points = {
        path: point
        for path, _, point in insertion_points(root, method.kinds)
        if method.accepts(point) and not is_below(path, new)
    }
    if not points:
        raise UsageError(_no_insertion_point(root, method))
    for path, point in method.narrow(points).items():
        yield path, root.get_submodule(path), '', point


def _no_insertion_point(root, method):
    found = Counter(
        kind
        for _, _, point in insertion_points(root, POINT_KINDS)
        for kind in POINT_KINDS
        if kind in point.kinds
    )
    fitting = [
        name
        for name, other in METHODS.module_dict.items()
        if issubclass(other, ActivationMethod) and found.keys() & set(other.kinds)
    ]
    wanted = ' or '.join(f'{kind!r} ({POINT_DESCRIPTIONS[kind]})' for kind in method.kinds)
    counts = ', '.join(f'{number} {kind!r}' for kind, number in found.items())
    return (
        f'{type(method).__name__} acts at places of kind {wanted}, and {type(root).__name__} has '
        f'none. It has {counts or "no place of any kind"}. '
        + (f'{", ".join(fitting)} would fit, and so would m' if fitting else 'M')
        + 'ethods on weights, such as LoRA, on whatever weights it has.'
    )


def _patterns(targets):
    return targets.include + targets.exclude + tuple(targets.overrides)


def _matches(patterns, name):
    return any(re.search(pattern, name) for pattern in patterns)


def _overridden(method, overrides, name):
    for pattern, arguments in overrides.items():
        if re.search(pattern, name):
            where = f'targets.overrides[{pattern!r}]: '
            arguments = known_arguments(type(method), arguments, where)
            if 'rank' in arguments and hasattr(method, 'budget'):
                arguments = dict(budget=None) | arguments
            method = replace(method, **arguments)
    return method


def _listed(kinds):
    return 'any' if kinds is None else '/'.join(kinds)
