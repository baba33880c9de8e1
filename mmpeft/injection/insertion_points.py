"""Where activations can be changed, told from the structure of a network.

Structure is which layers a module holds and how their widths follow each
other; names of classes play no part, so that timm's, torchvision's, mmdet's and
a network of one's own are read alike.
"""

import inspect
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import NamedTuple

from torch import Size, nn

from mmpeft.methods.spec import ConvGeometry, InsertionPoint, WeightSpec

from .structure import (
    Network,
    is_affine,
    is_norm,
    is_spatial_depthwise,
    is_torch_attention,
    is_within,
    level,
    lineage,
    smallest,
    within,
)
from .weights import ADAPTERS, PARAMETRIZATIONS


def insertion_points(
    root: nn.Module, kinds: Iterable[str]
) -> Iterator[tuple[str, nn.Module, InsertionPoint]]:
    """The places of some kinds below a module, with their paths, in its order.

    Args:
        root: Plain, or adapted already.
        kinds: Of ``POINT_KINDS``. A module that is a place of several is one place.
    """
    finder = _Finder(root)
    found = defaultdict(dict)
    for kind in kinds:
        for path, find in getattr(finder, kind).items():
            found[path][kind] = find
    seen = set()
    for path, module in finder.modules.items():
        if path in found:
            yield path, module, finder.place(path, found[path], seen.isdisjoint(found[path]))
            seen.update(found[path])


class _Find(NamedTuple):
    block: str
    out_features: int
    in_features: int
    axis: int


class _Finder(Network):
    """Each property holds the places of one kind by path."""

    def place(self, path: str, finds: dict[str, _Find], first: bool) -> InsertionPoint:
        module, layer = self.modules[path], self.layers.get(path)
        kinds = frozenset(finds) | (layer.kinds if 'layer' in finds else frozenset())
        block, *shape, axis = next(iter(finds.values()))
        size = _size(self.modules[block])
        window = ConvGeometry.of(module, layer) if layer and 'conv' in layer.kinds else None
        return InsertionPoint(kinds, Size(shape), axis, size, first, layer, window)

    @cached_property
    def attention(self):
        """``nn.MultiheadAttention``, or linear children or grandchildren as :func:`_projection`."""
        found = {}
        for path, module in self.modules.items():
            if is_torch_attention(module):
                found[path] = module.embed_dim
            elif not self.is_container(path) and (width := _projection(self.below(path, depth=2))):
                found[path] = width
        return {path: _Find(path, found[path], found[path], -1) for path in smallest(found)}

    @cached_property
    def mlp(self):
        """The smallest modules with such layers and no convolution but depthwise ones."""
        found = {path: width for path in self.modules if (width := self._mlp_width(path))}
        return {
            path: _Find(path, found[path], found[path], _axis(self.below(path).values()))
            for path in smallest(found)
            if not any(is_within(path, top) for top in self.attention)
        }

    def _mlp_width(self, path):
        specs = list(self.below(path).values())
        affine = [spec for spec in specs if is_affine(spec)]
        others = [spec for spec in specs if not is_affine(spec)]
        if not 2 <= len(affine) <= 3 or not all(map(is_spatial_depthwise, others)):
            return None
        *into, back = affine
        width, hidden = back.out_features, back.in_features
        given = sum(spec.out_features for spec in into)
        plain = given == hidden >= width and len(into) == 1
        gated = given == 2 * hidden > 2 * width
        fits = (plain or gated) and all(spec.in_features == width for spec in into)
        return width if fits and path not in self._chains else None

    @cached_property
    def mixer(self):
        """Before the only mlp of a block without attention, and as wide."""
        return {path: self._own(path) for path in self.layers if self._is_mixer(path)}

    def _is_mixer(self, path):
        spec = self.layers[path]
        blocks = [p for p in lineage(path) if within(self.mlp, p)]
        if not is_spatial_depthwise(spec) or not blocks:
            return False
        mlps = within(self.mlp, blocks[-1])
        if len(mlps) > 1 or within(self.attention, blocks[-1]):
            return False
        first = next(p for p, s in self.below(mlps[0]).items() if is_affine(s))
        order = list(self.layers)
        before = order.index(path) < order.index(first)
        return before and spec.in_features == self.mlp[mlps[0]].in_features

    @cached_property
    def branch(self):
        """The last norm of a residual block, or its last layer if no norm follows that."""
        found = {}
        for block, chain in self._chains.items():
            specs = [self.layers[path] for path in chain]
            own = [p for p in within(self.modules, block) if level(p) == level(block) + 1]
            after = own[own.index(chain[-1]) + 1 :]
            ends = [chain[-1], *(p for p in after if is_norm(self.modules[p]))]
            widths = specs[-1].out_features, specs[0].in_features
            found[ends[-1]] = _Find(block, *widths, _axis(specs[-1:]))
        return found

    @cached_property
    def _chains(self):
        """The layers of each residual block of chained convolutions."""
        chains = {p: self._chain(p) for p in self.modules if not self.is_container(p)}
        return {path: chain for path, chain in chains.items() if chain}

    def _chain(self, block):
        """Children that follow each other, from d to d or to e beside a shortcut d -> e."""
        own = self.below(block, depth=1)
        own.pop(block, None)
        chain = []
        for path, spec in own.items():
            if not chain or own[chain[-1]].out_features == spec.in_features:
                chain.append(path)
        if len(chain) < 2 or all(is_affine(own[path]) for path in chain):
            return None
        widths = own[chain[0]].in_features, own[chain[-1]].out_features
        beside = [spec for path, spec in self.below(block).items() if path not in chain]
        if any((spec.in_features, spec.out_features) == widths for spec in beside):
            return chain
        strided = any(self._window(p).stride.count(1) < len(own[p].kernel_size) for p in chain)
        return chain if widths[0] == widths[1] and not strided else None

    @cached_property
    def layer(self):
        """Those whose own forward runs."""
        return {path: self._own(path) for path in self.layers if self.is_called(path)}

    @cached_property
    def tokens(self):
        """The smallest modules with one attention, one mlp and no convolution."""
        found = smallest(path for path in self.modules if self._is_token_block(path))
        attention = {path: self.attention[within(self.attention, path)[0]] for path in found}
        return {path: attention[path]._replace(block=path) for path in found}

    def _is_token_block(self, path):
        if len(within(self.attention, path)) != 1 or len(within(self.mlp, path)) != 1:
            return False
        if any('conv' in spec.kinds for spec in self.below(path).values()):
            return False
        inside = self.inside(path)
        return not any(map(_is_positional, inside)) and _is_batch_first(inside)

    @cached_property
    def border(self):
        """Of the layers of blocks, mlps and mixers."""
        inner = {p for chain in self._chains.values() for p in chain} | set(self.mixer)
        inner |= {p for mlp in self.mlp for p in self.below(mlp)}
        return {p: self._own(p) for p in self.layers if p in inner and self._is_border(p)}

    def _is_border(self, path):
        spec, window = self.layers[path], self._window(path)
        return (
            isinstance(self.modules[path], nn.modules.conv._ConvNd)
            and not spec.transposed
            and window.padding_mode == 'zeros'
            and set(window.stride) == {1}
            and all(size % 2 for size in spec.kernel_size)
            and any(before for before, _ in window.padding)
        )

    def _window(self, path):
        return ConvGeometry.of(self.modules[path], self.layers[path])

    def _own(self, path):
        spec = self.layers[path]
        return _Find(path, spec.out_features, spec.in_features, _axis([spec]))


def _axis(specs):
    """Where channels are in what goes into a chain of layers."""
    return 1 if 'conv' in next(iter(specs)).kinds else -1


def _projection(specs: dict[str, WeightSpec]) -> int | None:
    """The width d of attention: layers d -> 3 e, together or apart, before one e -> d.

    Layers apart are told by nothing but size from any others, so that one of
    them has to be named as the query.
    """
    linear = {path: spec for path, spec in specs.items() if 'linear' in spec.kinds}
    for number, back in enumerate(linear.values()):
        inner, width = back.in_features, back.out_features
        given = {
            path: spec.out_features
            for path, spec in list(linear.items())[:number]
            if spec.in_features == width and spec.out_features % inner == 0
        }
        if sum(given.values()) == 3 * inner:
            if len(given) == 1 or any(_QUERY.search(path.lower()) for path in given):
                return width
    return None


_QUERY = re.compile(r'(^|[._])(w?q|query|queries)(_|$)')


def _is_positional(module):
    """Whether attention depends on where a token stands: windows, tables, rotations."""
    held = [*module._parameters, *module._buffers]
    return (
        bool(getattr(module, 'window_size', None))
        or any('relative_position' in name or 'rel_pos' in name for name in held)
        or 'rope' in inspect.signature(module.forward).parameters
    )


def _is_batch_first(modules):
    """False for ``nn.MultiheadAttention`` over (L, N, C) that no module around it turns."""
    flags = [m.batch_first for m in modules if isinstance(getattr(m, 'batch_first', None), bool)]
    return not flags or any(flags)


def _size(module):
    """Parameters of a module without those of adapters in it."""
    return sum(p.numel() for path, p in module.named_parameters() if not _is_adapters(path))


def _is_adapters(path):
    *above, name = path.split('.')
    return ADAPTERS in above or (PARAMETRIZATIONS in above and not name.startswith('original'))
