"""Convolutions with groups, of which no method has a thin form."""

from dataclasses import dataclass
from typing import ClassVar

from mmpeft.methods.spec import ConvGeometry

from .conv import convolution_gradients
from .cpu import depthwise
from .function import FastFunction


@dataclass(eq=False)
class GroupedConv(FastFunction):
    """y = x convolved with W, plus b.

    Shapes: ``x`` (N, I, *size); ``weight`` W (O, I / groups, *kernel), adapted already; ``bias`` b
    (O,) or None. The result is (N, O, *size'), and each gradient has its argument's shape.

    Attributes:
        geometry: Of the layer, with zeros alone and as many before an axis as after it.
        groups: Of channels.
        is_depthwise: Whether :func:`mmpeft.execution.cpu.depthwise.kernel_gradient` is faster.
    """

    recomputes_input: ClassVar = True
    geometry: ConvGeometry
    groups: int
    is_depthwise: bool = False

    def forward(self, save, x, weight, bias):
        save()
        return self.reference(x, weight, bias)

    def gradients(self, needs, dy, x, weight, bias):
        need_x, need_weight, need_bias = needs
        by_torch = need_weight and not self.is_depthwise
        dx = d_weight = d_bias = None
        if need_x or by_torch:
            args = self.geometry, dy, x, weight, [need_x, by_torch]
            dx, d_weight = convolution_gradients(*args, self.groups)
        if need_weight and self.is_depthwise:
            d_weight = depthwise.kernel_gradient(x, dy, weight.shape, self.geometry.zeros)
        if need_bias:
            d_bias = dy.sum([d for d in range(dy.ndim) if d != 1])
        return dx, d_weight, d_bias

    def reference(self, x, weight, bias):
        return self.geometry.convolve(x, weight, bias, self.groups)
