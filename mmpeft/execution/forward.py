"""The forward of an adapted layer by each kernel: its tensors in one dtype and the kernel's layout.

Of every function ``form`` is the adapter's normal form, and ``x`` is (..., in) or (N, in, *size).
``branch``: the update is computed beside the layer instead of in its weight.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.methods.normal_form import NormalForm, Scales
from mmpeft.methods.precision import outside_autocast
from mmpeft.methods.spec import CONVOLUTIONS, ConvGeometry, WeightSpec

from .conv import TuckerConv
from .grouped import GroupedConv
from .linear import AdaptedLinear
from .matmul import ChannelsLast, flat, is_low, layout_of, times, unflat
from .recompute import cast, is_tagged, offer_product, tag_for_recompute, through
from .row_ratio import row_ratio
from .scaled import ScaledLayer


class Layer(NamedTuple):
    """What a kernel reads of a layer whose weight has one adapter.

    Attributes:
        weight: W, as it is stored.
        bias: (out,) or None.
        spec: The role of the weight.
        geometry: Of a convolution; None for a linear layer.
        is_away_later: Whether backward may find W sharded where a later layer needs it.
    """

    weight: Tensor
    bias: Tensor | None
    spec: WeightSpec
    geometry: ConvGeometry | None
    is_away_later: bool


def composed(layer: Layer, form: NormalForm, x: Tensor) -> Tensor:
    """The layer with an additive update beside it, by torch's operations alone."""
    geometry, kernel_size = layer.geometry, layer.spec.kernel_size
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))  # once for all products
    with outside_autocast(x.device.type):
        form, core = form.dropped(layer.spec), None
        if geometry is None:
            up, down = form.matrices()
        else:
            form = form.with_core(kernel_size)
            up, core, down = form.up, form.core, form.down
        up = times(up, form.scale)
    up, core, down = (t if t is None else cast(t, x.dtype) for t in (up, core, down))
    if geometry is None:
        narrow = F.linear(F.linear(x, down), up)
        return F.linear(x, layer.weight, layer.bias) + narrow
    ones, pointwise = (1,) * len(kernel_size), CONVOLUTIONS[len(kernel_size)]
    narrow = x if down is None else pointwise(x, down.view(*down.shape, *ones))
    narrow = pointwise(geometry.convolve(narrow, core), up.view(*up.shape, *ones))
    return geometry.convolve(x, layer.weight, layer.bias) + narrow


def beside(layer: Layer, form: NormalForm, x: Tensor) -> Tensor:
    """A linear layer with an additive update beside it, where no gradient is wanted."""
    up, down = form.dropped(layer.spec).matrices()
    y, narrow = F.linear(x, layer.weight, layer.bias), F.linear(x, down)
    y.view(-1, up.shape[0]).addmm_(narrow.view(-1, down.shape[0]), up.T, alpha=form.scale)
    return y


def built(layer: Layer, form: NormalForm, x: Tensor) -> Tensor:
    """The layer as it is, for a weight that no gradient is wanted of."""
    x, weight, bias = _in_one_dtype(x, layer.weight, layer.bias)
    with outside_autocast(x.device.type):
        adapted = form.dropped(layer.spec).built(layer.weight).to(weight.dtype)
        run = F.linear if layer.geometry is None else layer.geometry.convolve
        return run(x, adapted, bias)


def linear(layer: Layer, form: NormalForm, branch: bool, x: Tensor) -> Tensor:
    """A linear layer, or a convolution whose kernel has one element, by :class:`AdaptedLinear`."""
    original, bias, spec, geometry, is_away_later = layer
    layout = ChannelsLast
    if geometry is not None:
        layout, (x, size) = layout_of(x), _flat_at(x, geometry.stride)
        original = original.flatten(1)
    x, weight, bias = _in_one_dtype(x, original, bias)
    with outside_autocast(x.device.type):
        form = form.dropped(spec)
        ratio = row_ratio(form, original)
    branch = branch or (is_low(x) and form.update == 'additive' and ratio is None)
    function = AdaptedLinear(layout, form.update, form.scale, branch)
    run = function if geometry is None else lambda *t: unflat(function(*t), layout, size)
    tensors = x, weight, bias, *form.chain(), ratio
    y = run(*tensors)
    if ratio is None and not is_away_later:  # with a ratio y is kept
        offer_product(y, run, *tensors)
    return y


def scaled(layer: Layer, form: Scales, branch: bool, x: Tensor) -> Tensor:
    """A layer whose channels are scaled, by :class:`ScaledLayer`."""
    geometry = layer.geometry
    if geometry is not None:
        x, geometry = geometry.padded(x)  # which autocast may compute in float32
    x, weight, bias = _in_one_dtype(x, layer.weight, layer.bias)
    function = ScaledLayer(geometry, layer.spec.groups, branch)
    return function(x, weight, bias, form.outputs, form.inputs)


def conv(layer: Layer, form: NormalForm, branch: bool, thin: bool, x: Tensor) -> Tensor:
    """A convolution without groups, by :class:`TuckerConv`."""
    x, geometry = layer.geometry.padded(x)
    x, weight, bias = _in_one_dtype(x, layer.weight, layer.bias)
    with outside_autocast(x.device.type):
        form = form.dropped(layer.spec).with_core(layer.spec.kernel_size)
    function = TuckerConv(geometry, form.scale, branch, thin)
    return function(x, weight, bias, form.up, form.core, form.down)


def grouped(
    layer: nn.Module, geometry: ConvGeometry, groups: int, is_fast: bool, x: Tensor
) -> Tensor:
    """A convolution with groups and an adapted weight, by :class:`GroupedConv`.

    ``is_fast``: its kernel's gradient is computed as a convolution.
    """
    x, geometry = geometry.padded(x)
    x, weight, bias = _in_one_dtype(x, layer.weight, layer.bias)
    return GroupedConv(geometry, groups, is_fast)(x, weight, bias)


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
        x, weight = cast(x, dtype), cast(weight, dtype)
        bias = None if bias is None else cast(bias, dtype)
    return x, weight, bias
