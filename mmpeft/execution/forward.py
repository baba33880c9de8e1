"""The forward of an adapted layer by each kernel: its tensors in one dtype and the kernel's layout.

Of every function ``layer`` has one adapter on its weight, ``geometry`` is that of a convolution
and None for a linear layer, ``form`` is the adapter's normal form, and ``x`` is (..., in) or
(N, in, *size). ``branch``: the update is computed beside the layer instead of in its weight.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.methods.adapter import SHARDED
from mmpeft.methods.normal_form import NormalForm, Scales
from mmpeft.methods.precision import outside_autocast
from mmpeft.methods.spec import CONVOLUTIONS, ConvGeometry

from .conv import TuckerConv
from .cpu.depthwise import DepthwiseConv
from .linear import AdaptedLinear
from .matmul import ChannelsLast, flat, is_low, layout_of, unflat
from .recompute import cast, is_tagged, offer_product, tag_for_recompute, through
from .scaled import ScaledLayer

Geometry = ConvGeometry | None


def composed(layer: nn.Module, form: NormalForm, x: Tensor) -> Tensor:
    """The layer with an additive update beside it, by torch's operations alone."""
    chain, geometry = layer.parametrizations.weight, layer.geometry
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))  # once for all products
    with outside_autocast(x.device.type):
        form = form.dropped(chain[0].spec)
        if geometry is None:
            up, down = form.matrices()
            core = None
        else:
            form = form.with_core(layer.kernel_size)
            up, core, down = form.up, form.core, form.down
        up = up * form.scale
    up, core, down = (t if t is None else t.to(x.dtype) for t in (up, core, down))
    if geometry is None:
        narrow = F.linear(F.linear(x, down), up)
        return F.linear(x, chain.original, layer.bias) + narrow
    ones, pointwise = (1,) * len(layer.kernel_size), CONVOLUTIONS[len(layer.kernel_size)]
    narrow = x if down is None else pointwise(x, down.view(*down.shape, *ones))
    narrow = pointwise(geometry.convolve(narrow, core), up.view(*up.shape, *ones))
    return geometry.convolve(x, chain.original, layer.bias) + narrow


def beside(layer: nn.Module, form: NormalForm, x: Tensor) -> Tensor:
    """A linear layer with an additive update beside it, where no gradient is wanted."""
    up, down = form.matrices()
    y = F.linear(x, layer.parametrizations.weight.original, layer.bias)
    narrow = F.linear(x, down)
    y.view(-1, len(up)).addmm_(narrow.view(-1, len(down)), up.T, alpha=form.scale)
    return y


def built(layer: nn.Module, geometry: Geometry, form: NormalForm, x: Tensor) -> Tensor:
    """The layer as it is, for a weight that no gradient is wanted of."""
    original = layer.parametrizations.weight.original
    x, weight, bias = _in_one_dtype(x, original, layer.bias)
    with outside_autocast(x.device.type):
        adapted = form.built(original).to(weight.dtype)
        run = F.linear if geometry is None else geometry.convolve
        return run(x, adapted, bias)


def linear(
    layer: nn.Module, geometry: Geometry, form: NormalForm, branch: bool, x: Tensor
) -> Tensor:
    """A linear layer, or a convolution whose kernel has one element, by :class:`AdaptedLinear`."""
    layout = ChannelsLast
    if geometry is not None:
        layout, (x, size) = layout_of(x), _flat_at(x, geometry.stride)
    original = layer.parametrizations.weight.original.flatten(1)
    x, weight, bias = _in_one_dtype(x, original, layer.bias)
    with outside_autocast(x.device.type):
        form = form.dropped(layer.parametrizations.weight[0].spec)
        up, down = form.matrices()
        if up is not form.up:
            tag_for_recompute(up, _compose, form.up, form.core)
        ratio = form.ratio(original)
    if form.update == 'additive' and ratio is None:
        branch, up, down = branch or is_low(x), cast(up, x.dtype), cast(down, x.dtype)
    function = AdaptedLinear(layout, form.update, form.scale, branch)
    run = function if geometry is None else lambda *t: unflat(function(*t), layout, size)
    y = run(x, weight, bias, up, down, ratio)
    if ratio is None and SHARDED not in layer.__dict__:  # with a ratio y is kept
        offer_product(y, run, x, weight, bias, up, down, ratio)
    return y


def scaled(layer: nn.Module, geometry: Geometry, form: Scales, branch: bool, x: Tensor) -> Tensor:
    """A layer whose channels are scaled, by :class:`ScaledLayer`."""
    if geometry is not None:
        x, geometry = geometry.padded(x)  # which autocast may compute in float32
    x, weight, bias = _in_one_dtype(x, layer.parametrizations.weight.original, layer.bias)
    function = ScaledLayer(geometry, getattr(layer, 'groups', 1), branch)
    return function(x, weight, bias, form.outputs, form.inputs)


def conv(
    layer: nn.Module, geometry: ConvGeometry, form: NormalForm, branch: bool, x: Tensor
) -> Tensor:
    """A convolution without groups, by :class:`TuckerConv`."""
    x, geometry = geometry.padded(x)
    x, weight, bias = _in_one_dtype(x, layer.parametrizations.weight.original, layer.bias)
    with outside_autocast(x.device.type):
        form = form.dropped(layer.parametrizations.weight[0].spec).with_core(layer.kernel_size)
    function = TuckerConv(geometry, form.scale, branch)
    return function(x, weight, bias, form.up, form.core, form.down)


def depthwise(layer: nn.Module, geometry: ConvGeometry, x: Tensor) -> Tensor:
    """A depthwise convolution under any method, by :class:`DepthwiseConv`."""
    x, geometry = geometry.padded(x)
    x, weight, bias = _in_one_dtype(x, layer.weight, layer.bias)
    return DepthwiseConv(geometry)(x, weight, bias)


def _compose(up, core):
    return up @ core.flatten(1)


def _flat_at(x, stride):
    """What a kernel of one element sees of a map, in the shape of its layout, and its size.

    Backward picks it again from the whole map, which other layers save.
    """
    if set(stride) == {1}:
        whole = partial(flat, layout=layout_of(x))
        y = whole(x)
        if is_tagged(x):
            again, kept = through(whole, x)
            tag_for_recompute(y, again, *kept)
        return y, x.shape[2:]
    size = tuple(-(-n // step) for n, step in zip(x.shape[2:], stride, strict=True))
    pick = partial(_picked, stride)
    return tag_for_recompute(pick(x), pick, x), size


def _picked(stride, x):
    seen = x[(..., *(slice(None, None, step) for step in stride))]
    return flat(seen.contiguous() if x.is_contiguous() else seen, layout_of(x))


def _in_one_dtype(x, weight, bias):
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = cast(x, dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return x, weight, bias
