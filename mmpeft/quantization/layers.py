"""Layers whose weight can be stored in few bits."""

from torch import nn

# Where the forward of layers is written that convolve with their kernel and do nothing else to it.
CONVOLUTIONS = 'torch.nn.modules.conv', 'timm.layers.conv2d_same', 'mmcv.cnn.bricks.wrappers'


def multiplies(layer: nn.Module) -> bool:
    """Whether a layer is a linear one, or a convolution that uses its kernel as it is.

    Those that standardize their kernel or give it to operators of their own (deformable
    convolutions) are not.
    """
    owner = next(c for c in type(layer).__mro__ if 'forward' in vars(c))
    return isinstance(layer, nn.Linear) or owner.__module__ in CONVOLUTIONS
