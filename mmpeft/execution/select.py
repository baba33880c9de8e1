"""Which kernel computes with an adapted weight: by the layer, its input and the method's form."""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils import parametrize

from mmpeft.methods import WeightAdapter
from mmpeft.methods.adapter import SHARDED
from mmpeft.methods.normal_form import NormalForm, Scales
from mmpeft.methods.precision import outside_autocast
from mmpeft.methods.spec import ConvGeometry
from mmpeft.quantization import Quantized
from mmpeft.transforms import is_transformed

from . import forward
from .cpu import depthwise
from .forward import Layer
from .linear import thin_pays
from .matmul import is_low
from .recompute import is_tagged

AUTO, PLAIN, MERGED, BRANCH, COMPOSED = CHOICES = 'auto', 'plain', 'merged', 'branch', 'composed'
WHERE = 'in the weight', 'as a branch'
DENSE = 'dense gradient, nothing kept'
# Multiply-adds that a GPU does while Python launches the products of a thin gradient.
LAUNCHES = 2**34
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
    """The kernel for a layer and an input; None where torch builds the weight as usual.

    Args:
        layer: Enabled, and with one adapter on its weight.
        x: (..., in) of a linear layer, (N, in, *size) of a convolution.
    """
    chain = layer.parametrizations.weight
    adapter, *others = chain
    if others or x.is_nested or not isinstance(adapter, WeightAdapter):
        return None
    original, spec, geometry = chain.original, adapter.spec, layer.geometry
    trains, transformed = torch.is_grad_enabled(), is_transformed()
    if original.is_complex() or x.is_complex():
        return None
    if geometry is not None:
        if x.ndim != len(spec.shape) or '_conv_forward' in layer.__dict__:
            return None
        if settings_of(layer) != layer.settings:  # changed since the adapter was attached
            geometry = ConvGeometry.of(layer, spec)

    def by(function, *arguments):
        parts = Layer(original, layer.bias, spec, geometry, SHARDED in layer.__dict__)
        return partial(function, parts, *arguments)

    if type(original) not in KNOWN or adapter._forward_pre_hooks:
        return None  # a DTensor, or an adapter that fully_shard gathers when it is called
    if not x.is_meta and any(t.is_meta for t in (original, *adapter.factors.values())):
        return None  # hooks of accelerate bring them when the modules that hold them are called
    with outside_autocast(original.device.type):
        form = adapter.method.normal_form(adapter.factors, spec, adapter.training)
    if isinstance(form, Scales):
        if transformed or parametrize._cache_enabled or original.requires_grad:
            return None
        adapter.check_sharding()
        branch = layer.execution == BRANCH
        if layer.execution == AUTO:
            branch = x.numel() < original.numel()
        return Kernel('scaled channels', by(forward.scaled, form, branch))
    if geometry is not None and spec.groups > 1:
        is_fast = depthwise.pays(layer, geometry, x)
        if not trains or transformed or not (is_fast or is_tagged(x)):
            return None
        run = partial(forward.grouped, layer, geometry, spec.groups, is_fast)
        name = 'kernel gradient as a convolution' if is_fast else 'input computed again'
        return Kernel(name, run, keeps_weight=True)
    if not spec.is_plain or (trains and original.requires_grad):
        return None  # the other kernels have no gradient for the original weight
    adapter.check_sharding()
    if form is None or (form.magnitude is not None and form.update != 'additive'):
        return None
    is_thin = form.is_thin
    out, features, *kernel_size = spec.shape
    positions = x.numel() // x.shape[-1 if geometry is None else 1]
    if geometry is not None:
        positions //= prod(geometry.stride)
    branch = layer.execution in (BRANCH, COMPOSED)
    if layer.execution == AUTO:
        passes = 2 if trains else 1
        # A trace is checked by another one, without gradients.
        keeps = trains or torch.jit.is_tracing() or _is_rounded(x, original)
        branch = (transformed and keeps) or branch_pays(
            positions, passes, out, features, *kernel_size
        )
    if transformed or layer.execution == COMPOSED:
        if not (branch and is_thin):
            return None
        return Kernel(f'thin layers, {WHERE[1]}', by(forward.composed, form))
    exact = not (trains or _is_rounded(x, original))
    if exact and not (branch and is_thin):
        if parametrize._cache_enabled:
            return None
        return Kernel('weight built in one pass', by(forward.built, form))
    if exact and geometry is None and x.dtype == original.dtype == form.up.dtype:
        return Kernel(f'thin products, {WHERE[1]}', by(forward.beside, form))
    if geometry is None or (spec.is_matrix and not any(map(any, geometry.padding))):
        parts = form.up, form.core, form.down
        sides = min(2, sum(t is not None and t.requires_grad for t in parts))
        thin = thin_pays(positions, out, features, form.rank, sides) and form.update == 'additive'
        branch = branch and is_thin
        name = f'thin products, {WHERE[branch]}' if thin else DENSE
        return Kernel(name, by(forward.linear, form, branch))
    if not is_thin:
        return None
    thin = not trains or layer.execution != AUTO
    thin = thin or tucker_pays(form, x, positions, geometry.stride, out, features, *kernel_size)
    branch = branch and thin and form.core is not None and form.down is not None
    name = f'thin convolutions, {WHERE[branch]}' if thin else DENSE
    return Kernel(name, by(forward.conv, form, branch, thin))


def settings_of(layer: nn.Module) -> tuple:
    """What a convolution's :class:`~mmpeft.methods.spec.ConvGeometry` follows from."""
    return layer.stride, layer.padding, layer.padding_mode, layer.dilation


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

    By the elements that they read and write: the branch reads a map of I channels once for each
    element of the kernel and adds to one of O; the weight is built in each of ``passes``, 2 with
    backward.
    """
    taps = prod(kernel_size)
    return positions * (out + features * taps) < passes * out * features * taps


def tucker_pays(
    form: NormalForm,
    x: Tensor,
    positions: int,
    stride: tuple[int, ...],
    out: int,
    features: int,
    *kernel_size: int,
) -> bool:
    """Whether thin convolutions are clearly cheaper than the dense gradient.

    They have few channels, and run at a fraction of a wide convolution's speed. V mixes channels
    at all positions of the input, which the stride makes more than the ``positions`` of the output.
    """
    taps, rank = prod(kernel_size), form.up.shape[1]
    if form.core is None or form.down is None:
        cost = 2 * rank * (out + taps * features)
    else:
        inner = len(form.down)
        cost = 2 * (rank * out + inner * features * prod(stride)) + 3 * taps * rank * inner
    dense = taps * out * features
    return 2 * cost < dense and (x.is_cpu or positions * (dense - cost) > LAUNCHES)
