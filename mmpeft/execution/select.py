"""Which kernel computes with an adapted weight: by the layer, its input and the method's form."""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils import parametrize

from mmpeft.methods import WeightAdapter
from mmpeft.methods.adapter import SHARDED
from mmpeft.methods.normal_form import NormalForm, Scales
from mmpeft.methods.precision import outside_autocast
from mmpeft.methods.spec import CONVOLUTIONS
from mmpeft.quantization import Quantized
from mmpeft.transforms import is_transformed

from .conv import TuckerConv
from .cpu import depthwise
from .linear import AdaptedLinear, thin_pays
from .matmul import ChannelsLast, flat, is_low, layout_of, unflat
from .recompute import cast, is_tagged, offer_product, tag_for_recompute, through
from .scaled import ScaledLayer

AUTO, PLAIN, MERGED, BRANCH, COMPOSED = CHOICES = 'auto', 'plain', 'merged', 'branch', 'composed'
WHERE = 'in the weight', 'as a branch'
KNOWN = Tensor, nn.Parameter, Quantized, FakeTensor


class Kernel(NamedTuple):
    """A fast forward of one layer.

    Attributes:
        name: For a reader.
        run: The output by the input.
        keeps_weight: Whether it keeps W' for backward.
    """

    name: str
    run: Callable[[Tensor], Tensor]
    keeps_weight: bool = False


def select_kernel(layer: nn.Module, x: Tensor) -> Kernel | None:
    """The fastest kernel for a layer and an input; None where torch builds the weight as usual.

    Args:
        layer: Enabled, and with one adapter on its weight.
        x: (..., in) of a linear layer, (N, in, *size) of a convolution.
    """
    chain = layer.parametrizations.weight
    adapter, *others = chain
    if others or not isinstance(adapter, WeightAdapter):
        return None
    original, spec, geometry = chain.original, adapter.spec, layer.geometry
    trains, transformed = torch.is_grad_enabled(), is_transformed()
    if geometry is not None and x.ndim != len(spec.shape):
        return None
    if type(original) not in KNOWN or adapter._forward_pre_hooks:
        return None  # a DTensor, or an adapter that fully_shard gathers when it is called
    with outside_autocast(original.device.type):
        form = adapter.method.normal_form(adapter.factors, spec, adapter.training)
    if isinstance(form, Scales):
        if transformed or parametrize._cache_enabled or original.requires_grad:
            return None
        adapter.check_sharding()
        return Kernel('scaled channels', partial(_run_scaled, layer, original, geometry, form))
    if 'depthwise' in spec.kinds:
        pays = trains and not transformed and depthwise.pays(layer, geometry, x)
        run = partial(_run_depthwise, layer, geometry)
        return Kernel('kernel gradient as a convolution', run, True) if pays else None
    if not spec.is_plain or (trains and original.requires_grad):
        return None  # the other kernels have no gradient for the original weight
    adapter.check_sharding()
    if form is None or (form.magnitude is not None and form.update != 'additive'):
        return None
    is_thin = form.update == 'additive' and form.magnitude is None
    out, features, *kernel_size = spec.shape
    positions = x.numel() // x.shape[-1 if geometry is None else 1]
    if geometry is not None:
        positions //= prod(geometry.stride)
    branch = layer.execution in (BRANCH, COMPOSED)
    if layer.execution == AUTO:
        passes = 2 if trains else 1
        branch = transformed or branch_pays(positions, passes, out, features, *kernel_size)
    if transformed or layer.execution == COMPOSED:
        run = partial(_run_composed, layer, form)
        return Kernel(f'thin layers, {WHERE[1]}', run) if branch and is_thin else None
    exact = not (trains or _is_rounded(x, original))
    if exact and not (branch and is_thin):
        run = partial(_run_built, layer, original, geometry, form.dropped(spec))
        return None if parametrize._cache_enabled else Kernel('weight built in one pass', run)
    if exact and geometry is None and x.dtype == original.dtype == form.up.dtype:
        run = partial(_run_beside, layer, original, form.dropped(spec))
        return Kernel(f'thin products, {WHERE[1]}', run)
    if geometry is None or (spec.is_matrix and not any(map(any, geometry.padding))):
        parts = form.up, form.core, form.down
        sides = min(2, sum(t is not None and t.requires_grad for t in parts))
        thin = thin_pays(positions, out, features, form.rank, sides) and form.update == 'additive'
        branch = branch and is_thin
        name = f'thin products, {WHERE[branch]}' if thin else 'dense gradient, nothing kept'
        return Kernel(name, partial(_run_linear, layer, geometry, form, branch))
    if not is_thin:
        return None
    if trains and layer.execution == AUTO and not tucker_pays(form, out, features, *kernel_size):
        return None
    branch = branch and form.core is not None and form.down is not None
    run = partial(_run_conv, layer, geometry, form, branch)
    return Kernel(f'thin convolutions, {WHERE[branch]}', run)


def has_one_adapter(layer: nn.Module) -> bool:
    """Whether a layer's weight carries one adapter and nothing else."""
    chain = layer.parametrizations.weight
    return len(chain) == 1 and isinstance(chain[0], WeightAdapter)


def _is_rounded(x, original):
    """Whether W' would be rounded so far that a small update vanishes.

    Evaluation then runs what training does.
    """
    return torch.is_autocast_enabled(x.device.type) or is_low(original)


def branch_pays(positions: int, passes: int, out: int, features: int, *kernel_size: int) -> bool:
    """Whether an update is cheaper as a branch beside a layer than in its weight.

    By the elements that they read and write: the branch reads a map of I channels and adds to one
    of O, once; the weight is built in each of ``passes``, 2 with backward.
    """
    return positions * (out + features) < passes * out * features * prod(kernel_size)


def tucker_pays(form: NormalForm, out: int, features: int, *kernel_size: int) -> bool:
    """Whether thin convolutions are clearly cheaper than the dense gradient, by position.

    They have few channels, and run at a fraction of a wide convolution's speed.
    """
    taps, rank = prod(kernel_size), form.up.shape[1]
    if form.core is None or form.down is None:
        cost = 2 * rank * (out + taps * features)
    else:
        inner = len(form.down)
        cost = 2 * (rank * out + inner * features) + 3 * taps * rank * inner
    return 2 * cost < taps * out * features


def _run_composed(layer, form, x):
    """The layer with an additive update beside it, by torch's operations alone."""
    chain, geometry = layer.parametrizations.weight, layer.geometry
    if layer.execution == COMPOSED and torch.is_autocast_enabled(x.device.type):
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


def _run_beside(layer, original, form, x):
    """A linear layer with an additive update beside it, where no gradient is wanted."""
    up, down = form.matrices()
    y, narrow = F.linear(x, original, layer.bias), F.linear(x, down)
    y.view(-1, len(up)).addmm_(narrow.view(-1, len(down)), up.T, alpha=form.scale)
    return y


def _run_built(layer, original, geometry, form, x):
    """The layer as it is, for a weight that no gradient is wanted of."""
    x, weight, bias = _in_one_dtype(x, original, layer.bias)
    with outside_autocast(x.device.type):
        adapted = form.built(original).to(weight.dtype)
        run = F.linear if geometry is None else geometry.convolve
        return run(x, adapted, bias)


def _run_linear(layer, geometry, form, branch, x):
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


def _run_scaled(layer, original, geometry, form, x):
    if geometry is not None:
        x, geometry = geometry.padded(x)  # which autocast may compute in float32
    x, weight, bias = _in_one_dtype(x, original, layer.bias)
    beside = layer.execution == BRANCH
    if layer.execution == AUTO:
        beside = x.numel() < original.numel()
    function = ScaledLayer(geometry, getattr(layer, 'groups', 1), beside)
    return function(x, weight, bias, form.outputs, form.inputs)


def _compose(up, core):
    return up @ core.flatten(1)


def _run_conv(layer, geometry, form, branch, x):
    x, geometry = geometry.padded(x)
    x, weight, bias = _in_one_dtype(x, layer.parametrizations.weight.original, layer.bias)
    with outside_autocast(x.device.type):
        form = form.dropped(layer.parametrizations.weight[0].spec).with_core(layer.kernel_size)
    function = TuckerConv(geometry, form.scale, branch)
    return function(x, weight, bias, form.up, form.core, form.down)


def _run_depthwise(layer, geometry, x):
    x, geometry = geometry.padded(x)
    x, weight, bias = _in_one_dtype(x, layer.weight, layer.bias)
    return depthwise.DepthwiseConv(geometry)(x, weight, bias)


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
