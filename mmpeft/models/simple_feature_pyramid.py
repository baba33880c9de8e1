"""ViTDet's simple feature pyramid (arXiv:2203.16527, section 3): all levels from one map."""

from collections.abc import Sequence

import torch.nn.functional as F
from mmengine.model import BaseModule
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from mmpeft.errors import UsageError
from mmpeft.registry import MODELS


@MODELS.register_module()
class SimpleFeaturePyramid(BaseModule):
    """Maps of several resolutions from the last map of a plain transformer.

    A transposed convolution (2x2, stride 2) doubles the resolution and halves
    the channels, max pooling halves the resolution; LayerNorm and GELU stand
    between two transposed convolutions. A 1x1 and a 3x3 convolution follow,
    each with LayerNorm, as in the paper's appendix.

    Args:
        in_channels: Of the backbone's map.
        out_channels: Of every level.
        scales: Resolution of each level, as a multiple of the map's. Patches of
            16 pixels and (4, 2, 1, 0.5) make strides of 4, 8, 16 and 32.
        num_outs: Levels in all; those beyond ``scales`` take every second point
            of the one before. As many as scales if None.
        init_cfg: As in :class:`mmengine.model.BaseModule`.

    Raises:
        UsageError: A scale is not 4, 2, 1 or 0.5, or there are more scales than
            levels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        scales: Sequence[float] = (4, 2, 1, 0.5),
        num_outs: int | None = None,
        init_cfg: dict | None = None,
    ):
        super().__init__(init_cfg)
        num_outs = len(scales) if num_outs is None else num_outs
        if not {4, 2, 1, 0.5}.issuperset(scales) or not 0 < len(scales) <= num_outs:
            raise UsageError(
                f'SimpleFeaturePyramid has no scales={tuple(scales)} in num_outs={num_outs} '
                'levels. Scales are of 4, 2, 1 and 0.5, and num_outs is at least their number.'
            )
        self.in_channels = in_channels
        self.num_outs = num_outs
        self.levels = nn.ModuleList(_level(in_channels, out_channels, scale) for scale in scales)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The last of the maps, (N, C, H, W), to ``num_outs`` maps (N, C', sH, sW).

        Raises:
            UsageError: The backbone's maps have other channels.
        """
        x = maps[-1]
        if x.shape[1] != self.in_channels:
            raise UsageError(
                f'SimpleFeaturePyramid was built for maps of {self.in_channels} channels and got '
                f'{x.shape[1]}. Set model.neck.in_channels={x.shape[1]}.'
            )
        # A norm's output is channels-last in memory, which mmcv's RoIAlign and DETRs do not take.
        levels = [level(x).contiguous() for level in self.levels]
        while len(levels) < self.num_outs:
            levels.append(F.max_pool2d(levels[-1], 1, stride=2))
        return tuple(levels)


def _level(width, out, scale):
    layers = []
    if scale == 0.5:
        layers.append(nn.MaxPool2d(2))
    while scale > 1:
        layers.append(nn.ConvTranspose2d(width, width // 2, 2, stride=2))
        width, scale = width // 2, scale / 2
        if scale > 1:
            layers += [LayerNorm2d(width), nn.GELU()]
    return nn.Sequential(
        *layers,
        nn.Conv2d(width, out, 1, bias=False),
        LayerNorm2d(out),
        nn.Conv2d(out, out, 3, padding=1, bias=False),
        LayerNorm2d(out),
    )
