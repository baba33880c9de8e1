"""Pretrained backbones without their classifiers."""

from collections.abc import Callable
from typing import NamedTuple

import material
import timm
import torch
from torch import nn


class Backbone(NamedTuple):
    """A backbone and the images that it expects.

    Attributes:
        make: Builds the network, which maps (N, 3, H, W) to features (N, C).
        mean, std: Of pixels from 0 to 255, gray or a channel each.
    """

    make: Callable[[], nn.Module]
    mean: float | tuple[float, float, float]
    std: float | tuple[float, float, float]


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with ImageNet-1k weights, without its classifier: (N, 1280)."""
    net = timm.create_model('tf_efficientnet_lite0', num_classes=1000)
    net.load_state_dict(material.efficientnet_lite0())
    net.reset_classifier(0)
    return net.to(memory_format=torch.channels_last)


BACKBONES = dict(efficientnet_lite0=Backbone(efficientnet_lite0, 127.0, 128.0))
