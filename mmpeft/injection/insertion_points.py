"""Insertion points: where activations can be changed, found from the structure of a network.

Structure means which layers a module holds and how their widths follow each other. Names count
only for query, key and value layers, which nothing else distinguishes.
"""

import inspect
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import combinations, dropwhile, takewhile

from torch import nn

from mmpeft.methods.spec import ConvGeometry, InsertionPoint, WeightSpec

from .calls import uncalled
from .points import (
    LISTS,
    axis_of,
    count,
    is_bordered,
    is_spatial_depthwise,
    layer_spec,
    make_point,
    mlp_ends,
    norm_spec,
    widths,
)
from .weights import is_below, join, layers, lineage, within

QUERY = re.compile(r'(^|[._])(w?q|query|queries)([._]|$)', re.IGNORECASE)
KEY = re.compile(r'(^|[._])(w?k|w?v|w?kv|keys?|values?)([._]|$)', re.IGNORECASE)
POSITIONS = re.compile(r'rope|rel_pos|relative|position|object_queries|(^|_)(size|shape)$')

Points = dict[str, InsertionPoint]


def smallest(found: dict) -> dict:
    """What was found at paths that have no other of them below."""
    outer = {above for path in found for above in lineage(path)[:-1]}
    return {path: value for path, value in found.items() if path not in outer}


class Search:
    """The insertion points of a network by path, a property for each kind.

    Attributes:
        modules: All modules by path, without adapters.
        above: The modules that hold the network, from the inner to the outer.
        layers: Roles of the linear layers and convolutions by path, without those inside
            ``nn.MultiheadAttention``, which never calls them.
    """

    def __init__(self, root: nn.Module, above: Sequence[nn.Module] = ()):
        self.modules, self.above = dict(layers(root)), above
        self.layers: dict[str, WeightSpec] = {}
        # Of each module, the layers in it by their paths below it.
        self._inside: dict[str, dict[str, WeightSpec]] = defaultdict(dict)
        whole = [p for p, m in self.modules.items() if isinstance(m, nn.MultiheadAttention)]
        for path, module in self.modules.items():
            spec = layer_spec(module)
            if spec and not is_below(path, whole):
                self.layers[path] = spec
                for top in lineage(path):
                    self._inside[top][path[len(top) :].removeprefix('.')] = spec

    def find(self, *kinds: str) -> Points:
        """The insertion points of some kinds; of a module that fits several, the first."""
        found = {}
        for kind in reversed(kinds):
            points = enumerate(getattr(self, kind).items())
            found |= {path: replace(point, first=not n) for n, (path, point) in points}
        return found

    @cached_property
    def attention(self) -> Points:
        """The smallest modules with layers d -> 3 e -> d; or query, keys and values, and e -> d."""
        return smallest(self._each(self._attention))

    def _attention(self, path, module):
        if isinstance(module, nn.MultiheadAttention):
            return make_point('attention', module, (module.embed_dim, module.embed_dim))
        linear = {p: s for p, s in self._near(path).items() if 'linear' in s.kinds}
        queries = set(filter(QUERY.search, linear))
        keys = set(filter(KEY.search, linear)) - queries
        for into, back in combinations(linear, 2):
            width, inner = widths(linear[back])
            is_query = into in queries and keys and back not in queries | keys
            if widths(linear[into]) == ((1 if is_query else 3) * inner, width):
                ends = (into, back) if '.' in back else ()
                return make_point('attention', module, (width, width), ends=ends)
        return None

    @cached_property
    def mlp(self) -> Points:
        """The smallest modules with layers d -> h -> d and h >= d, gated ones included.

        A block that holds attention of width d and such layers beside it is one as well.
        """
        found = smallest(self._each(self._mlp) | self._chains)
        return {path: point for path, point in found.items() if path not in self._chains}

    def _mlp(self, path, module):
        attention, inside = within(self.attention, path), self._inside[path]
        own = {p: s for p, s in inside.items() if not is_below(join(path, p), attention)}
        ends = mlp_ends(own)
        if not ends or is_below(path, self.attention):
            return None
        width, axis = own[ends[1]].out_features, axis_of(module.get_submodule(next(iter(own))))
        if not attention:
            return make_point('mlp', module, (width, width), axis)
        fits = all(self.attention[p].out_features == width for p in attention)
        if not fits or not self._near(path).keys() >= {*ends}:
            return None
        size = sum(count(module.get_submodule(p)) for p in own)
        return make_point('mlp', module, (width, width), axis, ends, size)

    @cached_property
    def mixer(self) -> Points:
        """The only depthwise convolution before the only MLP of a block without attention."""
        depthwise = {p: spec for p, spec in self.layers.items() if is_spatial_depthwise(spec)}
        points = {}
        for path, mlp in self.mlp.items():
            start = next(p for p in within(self.layers, path) if self.layers[p].is_matrix)
            before = [p for p in takewhile(start.__ne__, self.layers) if p in depthwise]
            before = [p for p in before if depthwise[p].in_features == mlp.in_features]
            alone = [p for p in reversed(lineage(path)) if within(self.mlp, p) == [path]]
            blocks = [within(before, p) for p in alone if not within(self.attention, p)]
            nearest = next(filter(None, blocks), ())
            points |= {p: self._own('mixer', p) for p in nearest if len(nearest) == 1}
        return points

    @cached_property
    def branch(self) -> Points:
        """The last norm of a residual block of convolutions, or its last layer if none follows."""
        points = {}
        for path, (first, *_, last) in self._chains.items():
            block, own = self.modules[path], self._inside[path]
            shape = own[last].out_features, own[first].in_features
            children = dict(block.named_children())
            after = dropwhile(last.__ne__, children)
            end = [last, *(name for name in after if norm_spec(children[name]))][-1]
            if (norm_spec(children[end]) or own[last]).out_features == shape[0]:
                axis, size = axis_of(children[last]), count(block)
                point = make_point('branch', children[end], shape, axis, numel=size)
                points[join(path, end)] = point
        return points

    @cached_property
    def _chains(self) -> dict[str, list[str]]:
        """The layers of residual blocks: children from d to d, or to e beside a shortcut d -> e."""
        return self._each(self._chain)

    def _chain(self, path, module):
        own, chain = self._inside[path], []
        for name, spec in own.items():
            if '.' not in name and (not chain or own[chain[-1]].out_features == spec.in_features):
                chain.append(name)
        is_mlp = mlp_ends(own) and not any(map(norm_spec, module.modules()))
        has_kernel = not all(own[name].is_matrix for name in chain)
        if is_mlp or len(chain) < 2 or not has_kernel or isinstance(module, nn.Sequential):
            return None
        ends = own[chain[-1]].out_features, own[chain[0]].in_features
        beside = [spec for p, spec in self._near(path).items() if p not in chain]
        shortcut = any('conv' in spec.kinds and widths(spec) == ends for spec in beside)
        strides = [ConvGeometry.of(getattr(module, name), own[name]).stride for name in chain]
        identity = ends[0] == ends[1] and set().union(*strides) <= {1}
        return chain if shortcut or identity else None

    @cached_property
    def layer(self) -> Points:
        """Linear layers and convolutions that the network calls."""
        parents = dict.fromkeys(path.rpartition('.')[0] for path in self.layers)
        dead = uncalled({path: self.modules[path] for path in parents})
        return {path: self._own('layer', path) for path in self.layers if path not in dead}

    @cached_property
    def tokens(self) -> Points:
        """The smallest modules with an attention, an MLP and no convolution that take prompts."""
        blocks = {}
        for path, module in self.modules.items():
            attention, mlps = within(self.attention, path), within(self.mlp, path)
            has_conv = any('conv' in spec.kinds for spec in self._inside[path].values())
            is_called = not isinstance(module, LISTS)
            if is_called and len(attention) == len(mlps) == 1 and not has_conv:
                blocks[path] = make_point('tokens', module, self.attention[attention[0]].shape)
        return {p: point for p, point in smallest(blocks).items() if self._takes_prompts(p)}

    def _takes_prompts(self, path):
        """Whether a block takes any number of an image's tokens, batch first."""
        inside = [self.modules[p] for p in within(self.modules, path)]
        names = [name for m in inside for name in (*m._parameters, *m._buffers, *m._modules)]
        names += [name for m in inside for name in inspect.signature(m.forward).parameters]
        # SAM has windows of size 0 where attention is global, on maps too.
        windows = any(getattr(m, 'window_size', None) is not None for m in inside)
        batch_first = [m.batch_first for m in inside if hasattr(m, 'batch_first')] or [True]
        if windows or not any(batch_first) or any(map(POSITIONS.search, names)):
            return False
        for top in (*(self.modules[p] for p in lineage(path)[-2::-1]), *self.above):
            # Images come in through a convolution, words through an embedding.
            if any(spec and 'conv' in spec.kinds for spec in map(layer_spec, top.modules())):
                return True
            if any(isinstance(m, nn.Embedding) for m in top.modules()):
                return False
        return True

    @cached_property
    def block(self) -> Points:
        """Residual blocks of convolutions, and the smallest modules with one MLP and one attention
        or mixer, with the norm between attention and MLP."""
        found = {}
        for path, module in self.modules.items():
            mixing = within({**self.attention, **self.mixer}, path)
            mlps = within(self.mlp, path)
            if isinstance(module, LISTS) or not len(mixing) == len(mlps) == 1:
                continue
            mlp, mixer = self.mlp[mlps[0]], self.modules[mixing[0]]
            is_conv = mixing[0] in self.mixer
            axis = axis_of(mixer) if is_conv else mlp.axis
            ends = () if is_conv else self._between(path, mixing[0], mlps[0])
            found[path] = make_point('block', module, mlp.shape, axis, ends)
        for path, (first, *_, last) in self._chains.items():
            own, module = self._inside[path], self.modules[path]
            shape = own[last].out_features, own[first].in_features
            found[path] = make_point('block', module, shape, axis_of(getattr(module, first)))
        return smallest(found)

    def _between(self, path, attention, mlp):
        """Of a block's two norms the second, and the first layer of its MLP; of others nothing."""
        start = self.mlp[mlp].ends[:1] or ('',)
        parts = [attention] + [mlp] * (mlp != path)
        norms = [p for p in within(self.modules, path) if norm_spec(self.modules[p])]
        norms = [p for p in norms if not is_below(p, parts)]
        if len(norms) != 2:
            return ()
        below = len(path) + bool(path)
        return norms[1][below:], join(mlp, *start)[below:]

    @cached_property
    def border(self) -> Points:
        """Convolutions of stride 1 with zeros around the map, in blocks, MLPs and mixers."""
        inner = [join(block, name) for block, chain in self._chains.items() for name in chain]
        inner += [*self.mlp, *self.mixer]
        found = [path for path in self.layers if is_bordered(self.modules[path])]
        return {path: self._own('border', path) for path in found if is_below(path, inner)}

    def _own(self, kind, path):
        """The point that is a layer."""
        module = self.modules[path]
        return make_point(kind, module, widths(self.layers[path]), axis_of(module))

    def _each(self, find):
        modules = {p: m for p, m in self.modules.items() if not isinstance(m, LISTS)}
        return {path: found for path, m in modules.items() if (found := find(path, m))}

    def _near(self, path):
        """The layers that are children or grandchildren of a module."""
        return {p: spec for p, spec in self._inside[path].items() if p.count('.') < 2}
