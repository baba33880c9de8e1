"""One insertion point: of a module that a search found, a user named, or a file lists."""

from dataclasses import replace

from torch import Size, nn

from mmpeft.errors import UsageError
from mmpeft.methods.spec import (
    POINT_DESCRIPTIONS,
    POINT_KINDS,
    ConvGeometry,
    InsertionPoint,
    WeightSpec,
)

from .site import own_parameters
from .weights import layers, weights_of

# Modules that have no forward of their own.
LISTS = nn.ModuleList | nn.ModuleDict


def make_point(
    kind: str,
    module: nn.Module,
    shape: tuple[int, int],
    axis: int = -1,
    ends: tuple[str, ...] = (),
    numel: int | None = None,
) -> InsertionPoint:
    """The insertion point of a kind at a module; the rest as in :class:`InsertionPoint`."""
    spec = layer_spec(module) if kind in ('layer', 'border') else None
    return InsertionPoint(
        frozenset({kind} | (spec.kinds if kind == 'layer' else set())),
        Size(shape),
        axis,
        count(module) if numel is None else numel,
        ends=ends,
        layer=spec if kind == 'layer' else None,
        geometry=ConvGeometry.of(module, spec) if spec and 'conv' in spec.kinds else None,
    )


def point_at(module: nn.Module, kind: str) -> InsertionPoint:
    """The insertion point of a kind at a module that was named, whatever the structure says.

    Raises:
        UsageError: The module does not have what the kind needs.
    """
    found = [m for _, m in layers(module)]
    found = [m for m in found if layer_spec(m)] or [m for m in found if norm_spec(m)]
    specs = [layer_spec(m) or norm_spec(m) for m in found]
    width_in, width_out = (specs[0].in_features, specs[-1].out_features) if specs else (0, 0)
    if isinstance(module, LISTS):
        reason = 'it only lists modules and is never called itself; name one of them'
    elif not specs:
        reason = 'it holds no linear layer, convolution or norm that tells its number of channels'
    elif kind in ('layer', 'border') and not layer_spec(module):
        reason = 'it is not a linear layer or convolution'
    elif kind == 'border' and not is_bordered(module):
        reason = 'its kernel must be odd, its stride 1, and its padding zeros'
    elif kind in ('mlp', 'tokens') and width_in != width_out:
        reason = f'its first layer takes {width_in} channels and its last one returns {width_out}'
    else:
        shape = width_out, width_out if kind == 'attention' else width_in
        return make_point(kind, module, shape, axis_of(found[0]))
    raise UsageError(
        f'{type(module).__name__} cannot be an insertion point of kind {kind!r} '
        f'({POINT_DESCRIPTIONS[kind]}): {reason}.'
    )


def restore_point(module: nn.Module, data: dict) -> InsertionPoint:
    """The insertion point that :meth:`InsertionPoint.to_dict` described, without a search.

    Raises:
        UsageError: The module does not have the layers that the data tells of.
    """
    kind = next((kind for kind in POINT_KINDS if kind in data['kinds']), None)
    shape, ends, spec = Size(data['shape']), tuple(data['ends']), layer_spec(module)
    fits = kind not in ('layer', 'border') or (spec and widths(spec) == shape)
    known = {path for path, _ in layers(module)}.issuperset(ends) and len(ends) in (0, 2)
    if not kind or not fits or not known:
        raise UsageError(
            f'{type(module).__name__} is not an insertion point of kind {kind!r}, shape '
            f'{tuple(shape)} (output and input channels) and layers {ends}.'
        )
    point = make_point(kind, module, shape, data['axis'], ends, data['numel'])
    return replace(point, first=data['first'])


def layer_spec(module: nn.Module) -> WeightSpec | None:
    """The role of a linear layer's or convolution's weight; None for any other module."""
    spec = dict(weights_of(module)).get('weight')
    return spec if spec and spec.kinds & {'conv', 'linear'} else None


def norm_spec(module: nn.Module) -> WeightSpec | None:
    """The role of a norm's weight; None for any other module."""
    return next((spec for _, spec in weights_of(module) if 'norm' in spec.kinds), None)


def is_spatial_depthwise(spec: WeightSpec) -> bool:
    """Whether a layer is a depthwise convolution over more than one position."""
    return 'depthwise' in spec.kinds and 'pointwise' not in spec.kinds


def mlp_ends(specs: dict[str, WeightSpec]) -> tuple[str, ...]:
    """First and last of layers d -> h -> d with h >= d, or gated, with 2 h in one layer or two.

    Depthwise convolutions may be among them. Layers that are not an MLP have no ends.
    """
    own = {path: spec for path, spec in specs.items() if not is_spatial_depthwise(spec)}
    if len(own) not in (2, 3) or not all(spec.is_matrix for spec in own.values()):
        return ()
    first, last = next(iter(own)), max(reversed(own), key=lambda p: own[p].in_features)
    width, hidden = widths(own.pop(last))
    given = sum(spec.out_features for spec in own.values())
    plain = len(own) == 1 and given == hidden >= width
    gated = given == 2 * hidden > 2 * width
    fits = (plain or gated) and all(spec.in_features == width for spec in own.values())
    return (first, last) if fits and first != last else ()


def widths(spec: WeightSpec) -> tuple[int, int]:
    """Output and input channels."""
    return spec.out_features, spec.in_features


def axis_of(module: nn.Module) -> int:
    """Where channels are in the tensors of a layer or norm."""
    spec = layer_spec(module)
    last = 'linear' in spec.kinds if spec else isinstance(module, nn.LayerNorm | nn.RMSNorm)
    return -1 if last else 1


def is_bordered(module: nn.Module) -> bool:
    """Whether a module is a convolution of stride 1 that pads with zeros around odd kernels."""
    spec = layer_spec(module)
    if not isinstance(module, nn.modules.conv._ConvNd) or spec.transposed:
        return False
    geometry = ConvGeometry.of(module, spec)
    zeros = geometry.padding_mode == 'zeros' and any(geometry.zeros)
    return zeros and set(geometry.stride) == {1} and all(size % 2 for size in spec.kernel_size)


def count(module: nn.Module) -> int:
    """Parameters of a module without those of adapters in it."""
    return sum(p.numel() for p in own_parameters(module))
