"""A depthwise convolution with a faster gradient of its kernel.

The gradient is itself a grouped convolution, of the padded input with dy as the
kernel, which for kernels above 3x3 is many times faster on a CPU than torch's own.
"""

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.execution.conv import convolution_gradients
from mmpeft.execution.function import FastFunction
from mmpeft.execution.recompute import is_tagged
from mmpeft.methods.spec import ConvGeometry

FAST_TAPS = 9  # Up to so many elements torch's own gradient of a kernel is as fast or faster.
SMALL_MAP = 2**12  # Maps of fewer elements (N C H W) are not worth it.


@dataclass(eq=False)
class DepthwiseConv(FastFunction):
    """y = x convolved with W, plus b, at stride and dilation 1.

    Shapes: ``x`` (N, C, H, W); ``weight`` W (C, 1, kh, kw), adapted already; ``bias`` b (C,) or
    None. The result is (N, C, H', W'), and each gradient has its argument's shape. The geometry
    is as in :class:`~mmpeft.execution.conv.TuckerConv`.
    """

    geometry: ConvGeometry

    def forward(self, save, x, weight, bias):
        save()
        return self.reference(x, weight, bias)

    def gradients(self, needs, dy, x, weight, bias):
        need_x, need_weight, need_bias = needs
        by_torch = need_weight and weight[0].numel() <= FAST_TAPS
        dx = d_weight = None
        if need_x or by_torch:
            args = self.geometry, dy, x, weight, [need_x, by_torch]
            dx, d_weight = convolution_gradients(*args, groups=len(weight))
        if need_weight and not by_torch:
            d_weight = kernel_gradient(x, dy, weight.shape, self.geometry.zeros)
        return dx, d_weight, dy.sum((0, 2, 3)) if need_bias else None

    def reference(self, x, weight, bias):
        return self.geometry.convolve(x, weight, bias, len(weight))


def pays(layer: nn.Module, geometry: ConvGeometry, x: Tensor) -> bool:
    """Whether a layer is such a convolution, on a map x (N, C, H, W) that is large enough.

    Where torch's gradient is fast, it is one only if its input is not to be kept.
    """
    return (
        isinstance(layer, nn.Conv2d)
        and set(geometry.stride) == set(geometry.dilation) == {1}
        and layer.in_channels == layer.out_channels == layer.groups
        and x.device.type == 'cpu'
        and x.numel() >= SMALL_MAP
        and (prod(layer.kernel_size) > FAST_TAPS or is_tagged(x))
    )


def kernel_gradient(x: Tensor, dy: Tensor, shape: torch.Size, padding: tuple[int, ...]) -> Tensor:
    """The gradient, of a shape (C, 1, kh, kw), of a depthwise kernel at stride 1.

    By the input (N, C, H, W), the gradient of the output (N, C, H', W') and the zeros around.
    """
    images, channels = x.shape[:2]
    x = x.reshape(1, images * channels, *x.shape[2:])
    dy = dy.reshape(images * channels, 1, *dy.shape[2:])
    gradient = F.conv2d(x, dy, padding=padding, groups=images * channels)
    return gradient.view(images, channels, *shape[2:]).sum(0).unsqueeze(1)
