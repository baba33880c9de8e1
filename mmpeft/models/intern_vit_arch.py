"""The sizes of InternViT."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from mmpeft.errors import UsageError, suggest
from mmpeft.registry import known_arguments

NORMS = dict(rms=nn.RMSNorm, layer=nn.LayerNorm)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What the published sizes of InternViT differ in.

    Attributes:
        depth: Number of blocks.
        width: Channels of a token.
        heads: Of the attention.
        hidden: Channels inside the MLP.
        image_size: Pixels that the position embeddings were trained at.
        patch_size: Pixels of a patch's side.
        qk_norm: Normalise queries and keys over the whole width.
        qkv_bias: Whether the attention's input projection has a bias.
        norm: ``'rms'`` or ``'layer'``.
        layer_scale: Initial value of s1 and s2.
        eps: Of all norms.
    """

    depth: int
    width: int
    heads: int
    hidden: int
    image_size: int = 448
    patch_size: int = 14
    qk_norm: bool = True
    qkv_bias: bool = False
    norm: str = 'rms'
    layer_scale: float = 0.1
    eps: float = 1e-6

    def __post_init__(self):
        if self.width % self.heads:
            raise UsageError(
                f'InternViT: width={self.width} is not a multiple of heads={self.heads}.'
            )
        if self.image_size % self.patch_size:
            raise UsageError(
                f'InternViT: image_size={self.image_size} is not a multiple of '
                f'patch_size={self.patch_size}.'
            )
        if self.norm not in NORMS:
            raise UsageError(f'InternViT: norm={self.norm!r} is none of {", ".join(NORMS)}.')


_6B = dict(width=3200, heads=25, hidden=12800)
ARCHITECTURES = {
    '6b-224px': Architecture(depth=48, image_size=224, **_6B),
    '6b': Architecture(depth=48, **_6B),
    '6b-45': Architecture(depth=45, **_6B),
    '300m': Architecture(
        depth=24, width=1024, heads=16, hidden=4096, qk_norm=False, qkv_bias=True, norm='layer'
    ),
}


def architecture_of(arch: str | Mapping | Architecture) -> Architecture:
    """An architecture from its name or its fields.

    Raises:
        UsageError: The name or a field is unknown, or a field is missing.
    """
    if isinstance(arch, Architecture):
        return arch
    if isinstance(arch, str):
        if arch not in ARCHITECTURES:
            raise UsageError(
                f'InternViT: there is no arch={arch!r}. {suggest(arch, ARCHITECTURES)}'
            )
        return ARCHITECTURES[arch]
    fields = known_arguments(Architecture, arch, 'InternViT: ')
    missing = [k for k in ('depth', 'width', 'heads', 'hidden') if k not in fields]
    if missing:
        raise UsageError(f'InternViT: arch lacks {", ".join(missing)}.')
    return Architecture(**fields)
