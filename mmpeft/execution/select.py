"""Which way to compute with an adapted weight, from the layer, its input and the method."""

from dataclasses import dataclass
from functools import partial
from math import prod
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmpeft.methods import WeightAdapter
from mmpeft.methods.normal_form import NormalForm
from mmpeft.methods.precision import outside_autocast

from .conv import DepthwiseConv, Geometry, TuckerConv
from .linear import Decomposed, LowRank, Multiplied, branch_pays
from .matmul import Rows, as_map, as_tokens, layout_of
from .recompute import Recipe, cast, remember

# Smaller depthwise maps than this are not worth another way (N C H W elements).
SMALL_MAP = 2**12


AUTO, PLAIN, MERGED, BRANCH = 'auto', 'plain', 'merged', 'branch'


@dataclass(frozen=True)
class Way:
    """One way to compute a layer's output.

    Attributes:
        name: Shown by ``tools/analysis_tools/explain.py``.
    """

    name: ClassVar[str]

    def run(self, layer: nn.Module, x: Tensor, form: NormalForm | None) -> Tensor:
        """The layer's output; ``form`` is what the method declares."""
        raise NotImplementedError


class Matrix(Way):
    """A linear layer or 1x1 convolution whose update is a product of thin matrices."""

    name = 'thin products'

    def run(self, layer, x, form):
        weight = layer.parametrizations.weight.original
        layout, is_linear = Rows, isinstance(layer, nn.Linear)
        if not is_linear:
            layout, (x, size) = layout_of(x), _seen(x, layer.stride)
        x, weight, bias = _in_one_dtype(x, weight.flatten(1), layer.bias)
        form = form.dropped(layer.parametrizations.weight[0].spec)
        up, down = form.matrices()
        scale = form.scale
        if form.magnitude is not None:
            magnitude, detach = form.magnitude, form.detach_norm
            y = Decomposed.apply(x, weight, bias, up, down, magnitude, scale, detach, layout)
        elif form.update == 'additive':
            up, down = up.to(x.dtype), down.to(x.dtype)
            branch = stands_beside(layer, layout.tokens(x), weight.shape)
            y = LowRank.apply(x, weight, bias, up, down, scale, layout, branch)
        else:
            exact = form.update == 'lie_exact'
            y = Multiplied.apply(x, weight, bias, up, down, scale, exact, layout)
        return y if is_linear else as_map(y, layout, size)


class Kernel(Way):
    """A convolution whose update is thin in both channel modes."""

    name = 'thin convolutions'

    def run(self, layer, x, form):
        x, weight, bias = _in_one_dtype(x, layer.parametrizations.weight.original, layer.bias)
        form = form.dropped(layer.parametrizations.weight[0].spec).with_kernel(layer.kernel_size)
        up, core, down, scale = form.up, form.core, form.down, form.scale
        geometry = Geometry.of(layer)
        tokens = len(x) * geometry.positions(x, weight)
        branch = down is not None and stands_beside(layer, tokens, weight.shape)
        return TuckerConv.apply(x, weight, bias, up, core, down, scale, geometry, branch)


class Depthwise(Way):
    """A depthwise convolution, its weight built, its gradient another way."""

    name = 'kernel gradient as a convolution'

    def run(self, layer, x, form):
        x, weight, bias = _in_one_dtype(x, layer.weight, layer.bias)
        return DepthwiseConv.apply(x, weight, bias, Geometry.of(layer))


MATRIX, KERNEL, DEPTHWISE = Matrix(), Kernel(), Depthwise()


def choose(layer: nn.Module, x: Tensor) -> tuple[Way, NormalForm | None] | None:
    """The fastest way for a layer and an input, and the normal form of phi(W).

    None to build the weight and go on as torch does.
    """
    if not torch.is_grad_enabled() or not has_one_adapter(layer):
        return None
    adapter = layer.parametrizations.weight[0]
    spec, is_conv = adapter.spec, not isinstance(layer, nn.Linear)
    if is_conv and (x.ndim != len(spec.shape) or not _is_zero_padded(layer)):
        return None
    if 'depthwise' in spec.kinds:
        return (DEPTHWISE, None) if _is_plain_depthwise(layer, x) else None
    if is_conv and layer.groups > 1:
        return None
    if layer.parametrizations.weight.original.requires_grad:
        return None  # the thin ways have no gradient for it
    with outside_autocast(adapter.device.type):
        form = adapter.method.normal_form(adapter.factors, spec, adapter.training)
    if form is None:
        return None
    normalized, additive = form.magnitude is not None, form.update == 'additive'
    if not is_conv or _is_pointwise(layer):
        return None if normalized and not additive else (MATRIX, form)
    if normalized or not additive:
        return None
    if layer.execution == AUTO and not _kernel_pays(form, spec.shape):
        return None
    return KERNEL, form


def stands_beside(layer: nn.Module, tokens: int, shape: tuple[int, ...]) -> bool:
    """Whether a thin update is computed beside the layer, or put into its weight.

    Args:
        layer: Enabled.
        tokens: Positions of the output, over the batch.
        shape: Of the weight.
    """
    if layer.execution == AUTO:
        out, features, *kernel = shape
        return branch_pays(tokens, out, features, prod(kernel))
    return layer.execution == BRANCH


def has_one_adapter(layer: nn.Module) -> bool:
    """Whether a layer's weight carries one adapter and nothing else."""
    chain = layer.parametrizations.weight
    return len(chain) == 1 and isinstance(chain[0], WeightAdapter)


def _is_plain_depthwise(layer, x):
    return (
        isinstance(layer, nn.Conv2d)
        and set(layer.stride) == set(layer.dilation) == {1}
        and layer.in_channels == layer.out_channels == layer.groups
        and x.device.type == 'cpu'
        and x.numel() >= SMALL_MAP
    )


def _is_pointwise(layer):
    return set(layer.kernel_size) == {1} and not any(layer.padding)


def _seen(x, stride):
    """What a kernel of one element sees of a map, as tokens, and its size.

    Every second position is picked again in backward: the map is kept by others.
    """
    if set(stride) == {1}:
        return as_tokens(x, layout_of(x)), x.shape[2:]
    size = tuple(-(-n // step) for n, step in zip(x.shape[2:], stride, strict=True))
    pick = partial(_picked, stride)
    return remember(pick(x), Recipe(pick, (x,))), size


def _picked(stride, x):
    seen = x[(..., *(slice(None, None, step) for step in stride))]
    return as_tokens(seen.contiguous() if x.is_contiguous() else seen, layout_of(x))


def _kernel_pays(form, shape):
    """Whether thin convolutions are clearly cheaper than the dense gradient, a position.

    They have few channels, and run at a part of a wide one's speed.
    """
    up, core, down = form.up, form.core, form.down
    out, features, *kernel = shape
    taps, rank = prod(kernel), up.shape[1]
    if core is None or down is None:
        cost = 2 * rank * (out + taps * features)
    else:
        inner = down.shape[0]
        cost = 2 * (rank * out + inner * features) + 3 * taps * rank * inner
    return 2 * cost < taps * out * features


def _is_zero_padded(layer):
    return layer.padding_mode == 'zeros' and not isinstance(layer.padding, str)


def _in_one_dtype(x, weight, bias):
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = cast(x, dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return x, weight, bias
