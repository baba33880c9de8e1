"""Which weights of a model are adapted."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace

from torch import Tensor, nn
from torch.nn.utils import parametrize

from .errors import UsageError, near
from .methods import Adapter, Method
from .weights import KINDS, WeightSpec, original_of, weights_of


@dataclass(frozen=True, kw_only=True)
class Targets:
    """A selection of weights below a sub-module.

    Patterns are regular expressions searched for in a weight's path below
    ``module``, such as ``stages_0.blocks.1.mlp.fc1.weight``.

    Attributes:
        module: Path of the sub-module; '' for the whole model.
        kinds: Kinds of layers, of ``conv``, ``depthwise``, ``pointwise``,
            ``linear``, ``embedding``, ``norm``; the method's own if None.
            A depthwise or 1x1 convolution is a ``conv`` too.
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
        for kind in (self.kinds or ()) + self.exclude_kinds:
            if kind not in KINDS:
                raise UsageError(f'targets: there is no kind {kind!r}. {near(kind, KINDS)}')
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


@dataclass
class Site:
    """One weight to adapt.

    Attributes:
        name: Path of the weight in the model.
        module: Its layer.
        tensor: Its name in the layer.
        spec: Its role.
        method: The method with the arguments that hold for it.
    """

    name: str
    module: nn.Module
    tensor: str
    spec: WeightSpec
    method: Method

    @property
    def weight(self) -> Tensor:
        """The stored parameter."""
        return original_of(self.module, self.tensor)


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


def layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules below a module with their paths, without the adapters in them."""
    for path, layer in module.named_modules():
        if 'parametrizations' not in path.split('.'):
            yield path, layer


def adapters_of(layer: nn.Module, tensor: str) -> list[Adapter]:
    """The adapters on a layer's weight, in the order in which they apply."""
    if not parametrize.is_parametrized(layer, tensor):
        return []
    return [p for p in layer.parametrizations[tensor] if isinstance(p, Adapter)]


def adapter_parameters(model: nn.Module):
    """The parameters of all adapters in a model."""
    for module in model.modules():
        if isinstance(module, Adapter):
            yield from module.parameters(recurse=False)


def select(model: nn.Module, method: Method, targets: Targets) -> list[Site]:
    """The weights that a method adapts under the given targets.

    Raises:
        UsageError: A pattern or kind matches no weight that the method is
            defined on, or an override is no argument of the method.
    """
    kinds = method.kinds if targets.kinds is None else targets.kinds
    prefix = f'{targets.module}.' if targets.module else ''
    sites, paths, seen = [], [], set()
    for path, layer in layers(target_module(model, targets.module)):
        for tensor, spec in weights_of(layer):
            name = f'{path}.{tensor}' if path else tensor
            if not method.accepts(spec):
                continue
            paths.append(name)
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
            sites.append(Site(prefix + name, layer, tensor, spec, chosen))
    for pattern in _patterns(targets):
        if pattern not in seen:
            raise UsageError(
                f'targets: the pattern {pattern!r} matches no weight of kind '
                f'{_listed(kinds)} below {targets.module or "the model"!r}. {near(pattern, paths)}'
            )
    if not sites and method.adapts:
        raise UsageError(
            f'targets: nothing below {targets.module or "the model"!r} is left for '
            f'{type(method).__name__} to adapt. It holds {len(paths)} weights that the method is '
            f'defined on; kinds={_listed(kinds)}, exclude_kinds={targets.exclude_kinds}, '
            f'include={targets.include}, exclude={targets.exclude} leave none.'
        )
    return sites


def _patterns(targets):
    return targets.include + targets.exclude + tuple(targets.overrides)


def _matches(patterns, name):
    return any(re.search(pattern, name) for pattern in patterns)


def _overridden(method, overrides, name):
    for pattern, arguments in overrides.items():
        if re.search(pattern, name):
            known = [f.name for f in fields(method)]
            for argument in arguments:
                if argument not in known:
                    raise UsageError(
                        f'targets.overrides[{pattern!r}]: {type(method).__name__} has no argument '
                        f'{argument!r}. {near(argument, known)}'
                    )
            if 'rank' in arguments:
                arguments = dict(budget=None) | arguments
            method = replace(method, **arguments)
    return method


def _listed(kinds):
    return 'any' if kinds is None else '/'.join(kinds)
