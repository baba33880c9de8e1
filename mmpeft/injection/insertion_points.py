"""Insertion points: where activations can be changed, found from the structure of a network.

Structure means which layers a module holds and how their widths follow each other. Names count
only for query, key and value layers, which nothing else distinguishes.
"""

import inspect
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property

from torch import nn

from mmpeft.methods.spec import ConvGeometry, InsertionPoint, WeightSpec

from .calls import uncalled
from .paths import below, depth, lineage, smallest, within
from .points import (
    LISTS,
    axis_of,
    count,
    is_affine,
    is_bordered,
    is_spatial_depthwise,
    layer_spec,
    make_point,
    mlp_ends,
    norm_spec,
    widths,
)
from .weights import is_below, join, layers

CONTAINERS = LISTS | nn.Sequential
QUERY = re.compile(r'(^|[._])(w?q|query|queries)([._]|$)', re.IGNORECASE)
KEY = re.compile(r'(^|[._])(w?k|w?v|w?kv|keys?|values?)([._]|$)', re.IGNORECASE)
POSITIONS = re.compile(r'rope|rel_pos|relative|position|object_queries')

Points = dict[str, InsertionPoint]


def insertion_points(
    root: nn.Module, kinds: Iterable[str]
) -> Iterator[tuple[str, nn.Module, InsertionPoint]]:
    """Find the insertion points of some kinds below a module.

    Args:
        root: With or without adapters.
        kinds: Of ``POINT_KINDS``. A module that fits several is yielded for each of them.

    Yields:
        Path, module and insertion point, in the order of the modules.
    """
    search = Search(root)
    found = [search.find(kind) for kind in kinds]
    for path, module in search.modules.items():
        for points in found:
            if path in points:
                yield path, module, points[path]


class Search:
    """The insertion points of a network, a property for each kind.

    Attributes:
        modules: All modules by path, without adapters.
        layers: Roles of the linear layers and convolutions by path, without those inside
            ``nn.MultiheadAttention``, which never calls them.
    """

    def __init__(self, root: nn.Module):
        self.modules = dict(layers(root))
        self.layers: dict[str, WeightSpec] = {}
        self._below: dict[str, dict[str, WeightSpec]] = defaultdict(dict)
        for path, module in self.modules.items():
            spec, (*above, _) = layer_spec(module), lineage(path)
            if spec and not any(isinstance(self.modules[p], nn.MultiheadAttention) for p in above):
                self.layers[path] = spec
                for top in (*above, path):
                    self._below[top][path] = spec

    def find(self, kind: str) -> Points:
        """The insertion points of a kind by path."""
        points = getattr(self, kind).items()
        return {path: replace(point, first=not n) for n, (path, point) in enumerate(points)}

    @cached_property
    def attention(self) -> Points:
        """The smallest modules with layers d -> 3 e -> d; or query, keys and values, and e -> d."""
        return smallest(self._each(self._attention))

    def _attention(self, path, module):
        if isinstance(module, nn.MultiheadAttention):
            return make_point('attention', module, module.embed_dim)
        own = {p: s for p, s in self._below[path].items() if 'linear' in s.kinds}
        own = {below(p, path): s for p, s in own.items() if depth(p) <= depth(path) + 2}
        queries = [p for p in own if QUERY.search(p)]
        keys = [p for p in own if KEY.search(p) and p not in queries]
        for n, (back, spec) in enumerate(own.items()):
            width, inner = widths(spec)
            into = [p for p in list(own)[:n] if widths(own[p]) == (3 * inner, width)]
            if not into and back not in queries + keys:
                # Keys and values are two layers or one, and may be narrower than queries.
                heads = [own[p].out_features / (1 + (len(keys) == 1)) for p in keys]
                if heads and not any(inner % head for head in heads):
                    into = [p for p in queries if widths(own[p]) == (inner, width)][:1]
            if len(into) == 1 and not isinstance(module, CONTAINERS):
                ends = (into[0], back) if '.' in back else ()
                return make_point('attention', module, width, ends=ends)
        return None

    @cached_property
    def mlp(self) -> Points:
        """The smallest modules with layers d -> h -> d and h >= d, gated ones included.

        A block that holds attention of width d and such layers beside it is one as well.
        """
        found = self._each(self._mlp)
        return {p: found[p] for p in smallest(found | self._chains) if p not in self._chains}

    def _mlp(self, path, module):
        inside = within(self.attention, path)
        own = {p: s for p, s in self._below[path].items() if not is_below(p, inside)}
        ends = mlp_ends(own)
        if not ends or is_below(path, self.attention):
            return None
        width, axis = own[ends[1]].out_features, axis_of(self.modules[next(iter(own))])
        if not inside:
            return make_point('mlp', module, width, axis=axis)
        fits = {self.attention[p].out_features for p in inside} == {width}
        if not fits or isinstance(module, CONTAINERS) or max(map(depth, ends)) > depth(path) + 2:
            return None
        ends = tuple(below(p, path) for p in ends)
        size = sum(count(self.modules[p]) for p in own)
        return replace(make_point('mlp', module, width, axis=axis, ends=ends), numel=size)

    @cached_property
    def mixer(self) -> Points:
        """The only depthwise convolution before the only MLP of a block without attention."""
        points = {}
        for path, mlp in self.mlp.items():
            for block in lineage(path)[::-1]:
                if len(within(self.mlp, block)) > 1 or within(self.attention, block):
                    break
                order = list(self._below[block])
                start = order.index(next(p for p in self._below[path] if is_affine(self.layers[p])))
                found = [p for p in order[:start] if is_spatial_depthwise(self.layers[p])]
                found = [p for p in found if self.layers[p].in_features == mlp.in_features]
                if found:
                    points |= {p: self._own('mixer', p) for p in found if len(found) == 1}
                    break
        return points

    @cached_property
    def branch(self) -> Points:
        """The last norm of a residual block of convolutions, or its last layer if none follows."""
        points = {}
        for block, (first, *_, last) in self._chains.items():
            children = [join(block, name) for name, _ in self.modules[block].named_children()]
            after = [p for p in children[children.index(last) :] if p in self.modules]
            norms = [p for p in after if norm_spec(self.modules[p])]
            end, ends = (norms or [last])[-1], (self.layers[first], self.layers[last])
            shape = ends[1].out_features, ends[0].in_features
            if not norms or norm_spec(self.modules[end]).out_features == shape[0]:
                axis, size = axis_of(self.modules[last]), count(self.modules[block])
                point = make_point('branch', self.modules[end], *shape, axis)
                points[end] = replace(point, numel=size)
        return points

    @cached_property
    def _chains(self) -> dict[str, list[str]]:
        """The layers of residual blocks: children from d to d, or to e beside a shortcut d -> e."""
        return self._each(self._chain)

    def _chain(self, path, module):
        own, chain = self._below[path], []
        for p in own:
            follows = not chain or own[chain[-1]].out_features == own[p].in_features
            if depth(p) == depth(path) + 1 and follows:
                chain.append(p)
        if len(chain) < 2 or all(is_affine(own[p]) for p in chain):
            return None
        plain_mlp = mlp_ends(own) and not any(map(norm_spec, module.modules()))
        if isinstance(module, CONTAINERS) or plain_mlp:
            return None
        ends = own[chain[-1]].out_features, own[chain[0]].in_features
        beside = [s for p, s in own.items() if p not in chain and depth(p) <= depth(path) + 2]
        if any('conv' in s.kinds and widths(s) == ends for s in beside):
            return chain
        strides = [ConvGeometry.of(self.modules[p], own[p]).stride for p in chain]
        return chain if ends[0] == ends[1] and set().union(*strides) <= {1} else None

    @cached_property
    def layer(self) -> Points:
        """Linear layers and convolutions that the network calls."""
        parents = {path.rpartition('.')[0] for path in self.layers if path}
        traced = {p: m for p, m in self.modules.items() if p in parents}
        dead = uncalled({p: m for p, m in traced.items() if not isinstance(m, CONTAINERS)})
        return {path: self._own('layer', path) for path in self.layers if path not in dead}

    @cached_property
    def tokens(self) -> Points:
        """The smallest modules with an attention, an MLP and no convolution that take prompts."""
        blocks = {}
        for path in self.modules:
            attention, mlp = within(self.attention, path), within(self.mlp, path)
            convs = any('conv' in spec.kinds for spec in self._below[path].values())
            if len(attention) == len(mlp) == 1 and not convs:
                blocks[path] = self.attention[attention[0]].out_features
        points = {p: make_point('tokens', self.modules[p], d) for p, d in smallest(blocks).items()}
        return {p: point for p, point in points.items() if self._takes_prompts(p)}

    def _takes_prompts(self, path):
        """Whether a block takes any number of an image's tokens, batch first."""
        inside = [self.modules[p] for p in within(self.modules, path)]
        names = [name for m in inside for name in (*m._parameters, *m._buffers, *m._modules)]
        names += [name for m in inside for name in inspect.signature(m.forward).parameters]
        windows = any(getattr(m, 'window_size', None) for m in inside)
        batch_first = {m.batch_first for m in inside if hasattr(m, 'batch_first')} or {True}
        if windows or True not in batch_first or any(map(POSITIONS.search, names)):
            return False
        for top in lineage(path)[-2::-1]:
            # Images come in through a convolution, words through an embedding.
            if any('conv' in spec.kinds for spec in self._below[top].values()):
                return True
            if any(isinstance(m, nn.Embedding) for m in self.modules[top].modules()):
                return False
        return True

    @cached_property
    def border(self) -> Points:
        """Convolutions of stride 1 with zeros around the map, in blocks, MLPs and mixers."""
        inner = {p for chain in self._chains.values() for p in chain} | set(self.mixer)
        inner |= {p for path in self.mlp for p in self._below[path]}
        found = [p for p in self.layers if p in inner and is_bordered(self.modules[p])]
        return {path: self._own('border', path) for path in found}

    def _own(self, kind, path):
        axis = axis_of(self.modules[path])
        return make_point(kind, self.modules[path], *widths(self.layers[path]), axis)

    def _each(self, find):
        modules = {p: m for p, m in self.modules.items() if not isinstance(m, LISTS)}
        return {path: found for path, m in modules.items() if (found := find(path, m))}
