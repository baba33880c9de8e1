"""A faster gradient of a depthwise kernel.

It is itself a grouped convolution, of the padded input with dy as the
kernel, which for kernels above 3x3 is many times faster on a CPU than torch's own.
"""

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.methods.spec import ConvGeometry

FAST_TAPS = 9  # Up to so many elements torch's own gradient of a kernel is as fast or faster.
SMALL_MAP = 2**12  # Maps of fewer elements (N C H W) are not worth it.


def pays(layer: nn.Module, geometry: ConvGeometry, x: Tensor) -> bool:
    """Whether that is faster than torch's gradient for a layer and a map x (N, C, H, W)."""
    return (
        isinstance(layer, nn.Conv2d)
        and set(geometry.stride) == set(geometry.dilation) == {1}
        and layer.in_channels == layer.out_channels == layer.groups
        and x.device.type == 'cpu'
        and x.numel() >= SMALL_MAP
        and prod(layer.kernel_size) > FAST_TAPS
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
