"""The layers of a network by path, and what can be told of them from outside."""

import dis
import inspect
from collections import defaultdict
from collections.abc import Iterable
from functools import cache

from torch import nn

from mmpeft.methods.spec import WeightSpec

from .weights import layers, weights_of


class Network:
    """The modules below a root, by path, the root's being ''.

    Attributes:
        modules: All of them, without adapters.
        layers: Linear layers and convolutions that are modules of their own:
            not those inside ``nn.MultiheadAttention``.
    """

    def __init__(self, root: nn.Module):
        self.modules = dict(layers(root))
        self.layers = {}
        self._below = defaultdict(list)
        for path, module in self.modules.items():
            spec = _layer(module)
            above = lineage(path)
            if spec and not any(is_torch_attention(self.modules.get(p)) for p in above[:-1]):
                self.layers[path] = spec
                for p in above:
                    self._below[p].append(path)

    def below(self, path: str, depth: int | None = None) -> dict[str, WeightSpec]:
        """Layers at a path and below it, in order; no deeper than ``depth`` levels."""
        limit = depth is not None and level(path) + depth
        return {p: self.layers[p] for p in self._below[path] if depth is None or level(p) <= limit}

    def is_container(self, path: str) -> bool:
        """Whether a module only lists others, and has no say in how they are joined."""
        return isinstance(self.modules[path], nn.Sequential | nn.ModuleList | nn.ModuleDict)

    def is_called(self, path: str) -> bool:
        """Whether a module's own forward runs, as far as its parent's code tells."""
        above, _, name = path.rpartition('.')
        return not path or name not in _only_read(type(self.modules[above]))

    def inside(self, path: str) -> list[nn.Module]:
        """A module and all below it."""
        return [m for p, m in self.modules.items() if is_within(p, path)]


def lineage(path: str) -> list[str]:
    """The paths from the root's to a module's own."""
    parts = path.split('.') if path else []
    return ['.'.join(parts[:n]) for n in range(len(parts) + 1)]


def level(path: str) -> int:
    """How many levels a path is below the root."""
    return len(path.split('.')) if path else 0


def is_within(path: str, top: str) -> bool:
    """Whether a path is another or below it."""
    return not top or path == top or path.startswith(f'{top}.')


def within(paths: Iterable[str], top: str) -> list[str]:
    """Those of some paths that are at another or below it."""
    return [path for path in paths if is_within(path, top)]


def smallest(paths: Iterable[str]) -> list[str]:
    """Those of some paths that have no other of them below."""
    paths = list(paths)
    outer = {above for path in paths for above in lineage(path)[:-1]}
    return [path for path in paths if path not in outer]


def is_torch_attention(module: nn.Module) -> bool:
    """Whether a module is torch's own attention."""
    return isinstance(module, nn.MultiheadAttention)


def is_affine(spec: WeightSpec) -> bool:
    """Whether a layer is one matrix at every position: linear, or a 1x1 convolution."""
    return 'linear' in spec.kinds or ('pointwise' in spec.kinds and spec.groups == 1)


def is_spatial_depthwise(spec: WeightSpec) -> bool:
    """Whether a layer is a depthwise convolution over more than one position."""
    return 'depthwise' in spec.kinds and 'pointwise' not in spec.kinds


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm with weights."""
    return any('norm' in spec.kinds for _, spec in weights_of(module))


def _layer(module) -> WeightSpec | None:
    spec = dict(weights_of(module)).get('weight')
    return spec if spec and spec.kinds.intersection(('conv', 'linear')) else None


@cache
def _only_read(kind: type) -> frozenset[str]:
    """Children whose weight or bias a class's forward reads without ever calling them.

    torchvision's Swin does so with ``qkv`` and ``proj``: a hook on them never runs.
    """
    code = getattr(inspect.unwrap(kind.forward), '__code__', None)
    steps = list(dis.get_instructions(code)) if code else []
    uses = defaultdict(set)
    for step, following in zip(steps, steps[1:], strict=False):
        if step.opname in ('LOAD_ATTR', 'LOAD_METHOD'):
            uses[step.argval].add(following.argval in ('weight', 'bias'))
    return frozenset(name for name, read in uses.items() if read == {True})
