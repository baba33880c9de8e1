"""How an adapted layer's input reaches the fast forms: kernels, which :mod:`.select` selects."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from mmpeft.methods.normal_form import NormalForm
from mmpeft.methods.precision import outside_autocast
from mmpeft.methods.spec import ConvGeometry

from .conv import TuckerConv, output_positions
from .costs import branch_pays, thin_pays
from .cpu.depthwise import DepthwiseConv
from .linear import LowRankLinear, MultiplicativeLinear, NormalizedLinear
from .matmul import ChannelsLast, flat, is_low, layout_of, unflat
from .recompute import cast, tag_for_recompute

AUTO, PLAIN, MERGED, BRANCH = CHOICES = 'auto', 'plain', 'merged', 'branch'


@dataclass(frozen=True, eq=False)
class Kernel:
    """A fast forward of one layer.

    Attributes:
        layer: With one adapter on its weight.
        geometry: Of a convolution; None of a linear layer.
        form: That of the adapter; None where the weight is built.
    """

    layer: nn.Module
    geometry: ConvGeometry | None
    form: NormalForm | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """The layer's output: (..., out) of a linear layer, (N, out, *size') of a convolution."""
        raise NotImplementedError

    def describe(self, x: Tensor) -> str:
        """What it does with an input, for a reader."""
        raise NotImplementedError

    @property
    def original(self) -> Tensor:
        """The frozen weight."""
        return self.layer.parametrizations.weight.original

    def positions(self, x: Tensor) -> int:
        """Positions of the output, over the batch."""
        if self.geometry is None:
            return x.numel() // x.shape[-1]
        return output_positions(self.geometry, x, self.layer.kernel_size)

    def takes_branch(self, x: Tensor) -> bool:
        """Whether the update is computed as a branch beside the layer, or in its weight."""
        if self.layer.execution == AUTO:
            return branch_pays(self.positions(x), *self.original.shape)
        return self.layer.execution == BRANCH

    def dropped(self) -> NormalForm:
        """The form with the dropout of one training step."""
        return self.form.dropped(self.layer.parametrizations.weight[0].spec)


class LinearKernel(Kernel):
    """A linear layer or 1x1 convolution whose update is a product of thin matrices."""

    def __call__(self, x):
        branch, layout, size = self.takes_branch(x), ChannelsLast, None
        if self.geometry is not None:
            layout, (x, size) = layout_of(x), _flat_at(x, self.geometry.stride)
        x, weight, bias = _in_one_dtype(x, self.original.flatten(1), self.layer.bias)
        with outside_autocast(x.device.type):
            form = self.dropped()
            up, down = form.matrices()
            if form.magnitude is not None:
                function = NormalizedLinear(layout, form.scale, form.detach_norm)
                y = function(x, weight, bias, up, down, form.magnitude)
            elif form.update != 'additive':
                function = MultiplicativeLinear(layout, form.scale, form.update == 'lie_exact')
                y = function(x, weight, bias, up, down)
            else:
                function = LowRankLinear(layout, form.scale, branch or is_low(x))
                y = function(x, weight, bias, up.to(x.dtype), down.to(x.dtype))
        return y if size is None else unflat(y, layout, size)

    def describe(self, x):
        rank = len(self.form.matrices()[1])
        if self.form.magnitude is not None:
            return 'thin products, in the weight'
        if self.form.update != 'additive' or not thin_pays(*self.original.shape[:2], rank):
            return 'dense gradient, nothing kept'
        return f'thin products, {_where(self.takes_branch(x))}'


class ConvKernel(Kernel):
    """A convolution without groups whose update is thin in both channel modes."""

    def __call__(self, x):
        branch = self.takes_branch(x)
        x, weight, bias = _in_one_dtype(x, self.original, self.layer.bias)
        x, geometry = self.geometry.padded(x)
        with outside_autocast(x.device.type):
            form = self.dropped().with_core(self.layer.kernel_size)
        function = TuckerConv(geometry, form.scale, branch)
        return function(x, weight, bias, form.up, form.core, form.down)

    def takes_branch(self, x):
        thin = self.form.core is not None and self.form.down is not None
        return thin and super().takes_branch(x)

    def describe(self, x):
        return f'thin convolutions, {_where(self.takes_branch(x))}'


class DepthwiseKernel(Kernel):
    """A depthwise convolution: its weight is built, its gradient comes another way."""

    def __call__(self, x):
        x, weight, bias = _in_one_dtype(x, self.layer.weight, self.layer.bias)
        x, geometry = self.geometry.padded(x)
        return DepthwiseConv(geometry)(x, weight, bias)

    def describe(self, x):
        return 'kernel gradient as a convolution'


def _flat_at(x, stride):
    """What a kernel of one element sees of a map, in the shape of its layout, and its size.

    Every second position is picked again in backward: the whole map is saved by others.
    """
    if set(stride) == {1}:
        return flat(x, layout_of(x)), x.shape[2:]
    size = tuple(-(-n // step) for n, step in zip(x.shape[2:], stride, strict=True))
    pick = partial(_picked, stride)
    return tag_for_recompute(pick(x), pick, x), size


def _picked(stride, x):
    seen = x[(..., *(slice(None, None, step) for step in stride))]
    return flat(seen.contiguous() if x.is_contiguous() else seen, layout_of(x))


def _in_one_dtype(x, weight, bias):
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = cast(x, dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return x, weight, bias


def _where(branch):
    return 'as a branch' if branch else 'in the weight'
