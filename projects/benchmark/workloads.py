"""What is trained: networks with random weights, and batches of fixed size."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import timm
import torch
from torch import Tensor, nn

from mmpeft.errors import UsageError, suggest
from mmpeft.models.intern_vit import Block, InternViT
from mmpeft.models.intern_vit_arch import ARCHITECTURES, Architecture

# Of a 504x504 image in patches of 14, and the class token.
TOKENS = 36**2 + 1


@dataclass(frozen=True)
class Workload:
    """A network and the size of its input.

    Attributes:
        name: As ``--workloads`` takes it.
        text: What it is, in a line.
        network: Builds it, with random weights.
        size: Of the input.
        dtype: Of the weights and the input.
        is_inner: Whether it is a part of a network, so that gradients flow on
            to its input whatever trains in it.
    """

    name: str
    text: str
    network: Callable[[], nn.Module]
    size: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    is_inner: bool = False

    def build(self, device: str = 'cpu', seed: int = 0) -> nn.Module:
        """The network in training mode, everything in it frozen."""
        torch.manual_seed(seed)
        with torch.device(device):
            network = self.network()
        return network.to(device, self.dtype).requires_grad_(False).train()

    def batch(self, device: str = 'cpu', seed: int = 0) -> Tensor:
        """An input of normal numbers, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.size, generator=generator).to(device, self.dtype)


def of_timm(name: str, model: str, height: int, width: int, batch: int) -> Workload:
    """All levels of a timm network on images."""
    text = f'{model}, {batch} x {height}x{width}'
    network = partial(timm.create_model, model, pretrained=False, features_only=True)
    return Workload(name, text, network, (batch, 3, height, width))


def of_intern_vit(name, arch: Architecture, blocks, batch, dtype=torch.float32) -> Workload:
    """Blocks from the midst of an InternViT on tokens."""
    text = f'{blocks} InternViT blocks of width {arch.width}, {batch} x {TOKENS} tokens'
    text += f', weights in {str(dtype).removeprefix("torch.")}'

    def network():
        return nn.Sequential(*(Block(arch) for _ in range(blocks)))

    return Workload(name, text, network, (batch, TOKENS, arch.width), dtype, is_inner=True)


def of_whole_intern_vit(name, arch: str | dict, side: int, frozen_dtype: str) -> Workload:
    """InternViT on one image, its frozen weights in a dtype or format."""
    text = f'InternViT {name}, 1 x {side}x{side}, weights in {frozen_dtype}'
    network = partial(InternViT, arch, frozen_dtype=frozen_dtype)
    name = f'internvit_{name}-{frozen_dtype}'
    return Workload(name, text, network, (1, 3, side, side), torch.bfloat16)


def of_layers(width: int, tokens: int, side: int) -> tuple[Workload, ...]:
    """Single layers as they stand in networks: many tokens and few, wide and thin kernels."""
    quarter = width // 4
    layers = dict(
        linear=(partial(nn.Linear, width, 4 * width), (8, tokens, width)),
        linear_few=(partial(nn.Linear, width, width), (8, width)),
        pointwise=(partial(nn.Conv2d, quarter, width, 1), (2, quarter, side, side)),
        conv=(partial(nn.Conv2d, quarter, quarter, 3, padding=1), (2, quarter, side, side)),
        patches=(partial(nn.Conv2d, quarter, width, 2, 2), (2, quarter, side, side)),
        depthwise=(
            partial(nn.Conv2d, quarter, quarter, 7, padding=3, groups=quarter),
            (2, quarter, side, side),
        ),
    )

    def network(layer):
        return nn.Sequential(layer())

    return tuple(
        Workload(
            f'{name}_{width}',
            f'{layer.func.__name__}{layer.args}, {"x".join(map(str, size))}',
            partial(network, layer),
            size,
            is_inner=True,
        )
        for name, (layer, size) in layers.items()
    )


SMALL_VIT, LARGE_VIT = ARCHITECTURES['300m'], ARCHITECTURES['6b']
FOR_CPU = (
    of_timm('convnextv2_base-160', 'convnextv2_base', 160, 160, 2),
    of_timm('convnextv2_tiny-512', 'convnextv2_tiny', 512, 512, 1),
    of_timm('resnet50-320', 'resnet50', 320, 320, 1),
    of_intern_vit('internvit_1024', SMALL_VIT, blocks=2, batch=1),
)
FOR_GPU = (
    of_timm('convnextv2_base-512', 'convnextv2_base', 512, 512, 8),
    of_timm('convnextv2_base-1024', 'convnextv2_base', 1024, 1024, 2),
    # Images of 1333x800 are padded to a multiple of 32.
    of_timm('convnextv2_base-1333', 'convnextv2_base', 800, 1344, 2),
    of_timm('convnextv2_large-512', 'convnextv2_large', 512, 512, 8),
    of_timm('convnextv2_large-1024', 'convnextv2_large', 1024, 1024, 2),
    of_timm('convnextv2_large-1333', 'convnextv2_large', 800, 1344, 2),
    of_timm('resnet50-1333', 'resnet50', 800, 1344, 2),
    of_timm('vit_large-224', 'vit_large_patch16_224', 224, 224, 32),
    of_intern_vit('internvit_1024-gpu', SMALL_VIT, blocks=4, batch=8, dtype=torch.bfloat16),
    of_intern_vit('internvit_3200', LARGE_VIT, blocks=4, batch=2, dtype=torch.bfloat16),
)
WORKLOADS = {workload.name: workload for workload in FOR_CPU + FOR_GPU}
QUICK = dict(
    cpu=('convnextv2_base-160', 'resnet50-320'), cuda=('convnextv2_base-512', 'internvit_1024-gpu')
)
FREE_FORM = re.compile(r'(?P<model>[^:]+):(?P<height>\d+)x(?P<width>\d+):(?P<batch>\d+)')


def names(device: str, quick: bool = False) -> list[str]:
    """The workloads that are measured on a kind of device."""
    if quick:
        return list(QUICK[device])
    return [workload.name for workload in (FOR_CPU if device == 'cpu' else FOR_GPU)]


def find(name: str) -> Workload:
    """The workload of a name, or of ``timm_model:HEIGHTxWIDTH:BATCH``.

    Raises:
        UsageError: There is none.
    """
    if name in WORKLOADS:
        return WORKLOADS[name]
    free = FREE_FORM.fullmatch(name)
    if not free:
        raise UsageError(
            f'--workloads: there is no {name!r}. {suggest(name, WORKLOADS)} Any timm network can '
            'be measured as model:HEIGHTxWIDTH:BATCH, such as convnextv2_atto:64x64:1.'
        )
    if not timm.is_model(free['model']):
        close = timm.list_models(f'{free["model"].split("_")[0]}*')
        raise UsageError(
            f'--workloads: timm has no model {free["model"]!r}. {suggest(free["model"], close)}'
        )
    return of_timm(name, free['model'], int(free['height']), int(free['width']), int(free['batch']))
