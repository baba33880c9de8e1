"""InternViT: the vision transformers of InternVL (arXiv:2312.14238) as a backbone.

Pre-norm blocks with layer scale, x + s1 * attn(norm1(x)), x + s2 * mlp(norm2(x)).
In the 6B model all norms are RMS norms and queries and keys are normalised over
the whole width before the heads are split. Parameter names are those of the
official checkpoints.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from timm.layers import DropPath, Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from mmpeft.errors import UsageError, suggest
from mmpeft.quantization import FORMATS, can_quantize, check_format, quantize, stored_parts
from mmpeft.registry import MODELS

from .intern_vit_arch import NORMS, Architecture, architecture_of
from .intern_vit_weights import load_weights

DTYPES = dict(float32=torch.float32, bfloat16=torch.bfloat16, float16=torch.float16)


class Embeddings(nn.Module):
    """Patches to tokens, the class token first, with position embeddings added."""

    def __init__(self, arch: Architecture):
        super().__init__()
        self.grid = arch.image_size // arch.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, arch.width))
        self.position_embedding = nn.Parameter(torch.zeros(1, self.grid**2 + 1, arch.width))
        self.patch_embedding = nn.Conv2d(3, arch.width, arch.patch_size, arch.patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, 1 + H/p W/p, C)."""
        patches = self.patch_embedding(images)
        tokens = patches.flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_embedding.expand(len(tokens), -1, -1), tokens], 1)
        return tokens + self.positions(*patches.shape[2:])

    def positions(self, height: int, width: int) -> Tensor:
        """Position embeddings of a grid, bicubically resized; (1, 1 + height width, C)."""
        if (height, width) == (self.grid, self.grid):
            return self.position_embedding
        first, rest = self.position_embedding[:, :1], self.position_embedding[:, 1:]
        rest = rest.float().unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        rest = F.interpolate(rest, (height, width), mode='bicubic', align_corners=False)
        return torch.cat([first, rest.flatten(2).transpose(1, 2).to(first.dtype)], 1)


class Attention(nn.Module):
    """Self-attention of all tokens."""

    def __init__(self, arch: Architecture):
        super().__init__()
        self.heads = arch.heads
        self.qkv = nn.Linear(arch.width, 3 * arch.width, bias=arch.qkv_bias)
        norm = NORMS[arch.norm] if arch.qk_norm else nn.Identity
        self.q_norm, self.k_norm = (norm(arch.width, eps=arch.eps) for _ in range(2))
        self.proj = nn.Linear(arch.width, arch.width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, C) to (N, L, C)."""
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.to(v.dtype).unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A transformer block; ``drop_path`` is its rate of stochastic depth."""

    def __init__(self, arch: Architecture, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = NORMS[arch.norm](arch.width, eps=arch.eps)
        self.attn = Attention(arch)
        self.ls1 = nn.Parameter(torch.full((arch.width,), arch.layer_scale))
        self.norm2 = NORMS[arch.norm](arch.width, eps=arch.eps)
        self.mlp = Mlp(arch.width, arch.hidden)
        self.ls2 = nn.Parameter(torch.full((arch.width,), arch.layer_scale))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, C) to (N, L, C)."""
        x = x + self.drop_path(self.attn(self.norm1(x)) * self.ls1)
        return x + self.drop_path(self.mlp(self.norm2(x)) * self.ls2)


@MODELS.register_module()
class InternViT(BaseModule):
    """Maps of some of the blocks, all at the resolution of the patches.

    mmseg's ``Feature2Pyramid`` (``rescales=[4, 2, 1, 0.5]``), a neck, makes a
    pyramid of them for dense heads, as in InternVL's UperNet recipe.

    Args:
        arch: ``'6b'``, ``'6b-224px'``, ``'6b-45'``, ``'300m'``, or the fields
            of :class:`~.intern_vit_arch.Architecture`.
        checkpoint: Weights, read by :meth:`init_weights`: a folder or an index
            of safetensors shards, or one file (``.safetensors``, ``.pth``,
            ``.bin``), in a layout of :mod:`.intern_vit_names`.
        out_indices: Blocks whose output is returned; the ends of four equal
            parts if None (11, 23, 35, 47 of 48).
        drop_path: Stochastic depth rate of the deepest block.
        with_cp: Recompute blocks in backward.
        frozen_dtype: ``'bfloat16'`` and ``'float16'`` hold the network in half
            the memory of ``'float32'``. ``'int8'``, ``'fp8'`` and ``'nf4'`` hold the weights of
            the blocks' linear layers in 8 or 4 bits, see
            :func:`~mmpeft.quantization.tensor.quantize`, and the rest in bfloat16; each weight is
            rounded as it is read. Adapters stay in float32. Only for weights that do not train.
        init_cfg: As in :class:`mmengine.model.BaseModule`.

    Raises:
        UsageError: An argument is unknown or does not fit.
    """

    def __init__(
        self,
        arch: str | Mapping = '6b',
        checkpoint: str | None = None,
        out_indices: Sequence[int] | None = None,
        drop_path: float = 0.0,
        with_cp: bool = False,
        frozen_dtype: str = 'float32',
        init_cfg: dict | None = None,
    ):
        super().__init__(init_cfg)
        self.arch = arch = architecture_of(arch)
        self.checkpoint = checkpoint
        self.recomputes = with_cp
        self.dtype = _dtype(frozen_dtype)
        bits = frozen_dtype if frozen_dtype in FORMATS else None
        self.out_indices = _taps(arch.depth, out_indices)
        rates = [drop_path * i / max(arch.depth - 1, 1) for i in range(arch.depth)]
        with _building(self.dtype, empty=checkpoint is not None):
            self.embeddings = Embeddings(arch)
            self.encoder = nn.Module()
            self.encoder.layers = nn.ModuleList(_quantized(Block(arch, r), bits) for r in rates)
        if checkpoint is not None and torch.get_default_device().type != 'meta':
            self.to_empty(device=torch.get_default_device())
            for parameter in self.parameters():
                for part in stored_parts(parameter).values():
                    nn.init.zeros_(part)

    def init_weights(self) -> None:
        """Load the checkpoint, or draw random weights if there is none.

        Raises:
            MissingFileError: The checkpoint, or one of its shards, does not exist.
            UsageError: It is damaged or of another model.
        """
        if self._is_init:
            return
        self._is_init = True
        if self.checkpoint is not None:
            load_weights(self, self.checkpoint)
            return
        for parameter in self.parameters():
            if parameter.ndim > 1:
                drawn = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
                with torch.no_grad():  # rounded once, where it is held in few bits
                    parameter.copy_(nn.init.trunc_normal_(drawn, std=0.02))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Maps of the blocks ``out_indices``, in the dtype of the images.

        (N, 3, H, W) to (N, C, H / p, W / p) each, with patches of p pixels.

        Raises:
            UsageError: The patch size does not divide the images' size.
        """
        patch = self.arch.patch_size
        height, width = images.shape[2:]
        if height % patch or width % patch:
            raise UsageError(
                f'InternViT: images of {height}x{width} pixels cannot be cut into patches of '
                f'{patch}. Set crop_size, the padding (data_preprocessor.size or size_divisor='
                f'{patch}) and the test mode to multiples of {patch}, such as '
                f'{-(-height // patch) * patch}x{-(-width // patch) * patch}.'
            )
        x = self.embeddings(images.to(self.dtype))
        grid = height // patch, width // patch
        maps = []
        for index, block in enumerate(self.encoder.layers[: self.out_indices[-1] + 1]):
            if self.recomputes and torch.is_grad_enabled():
                x = recompute(block, x, use_reentrant=False)
            else:
                x = block(x)
            if index in self.out_indices:
                tapped = x[:, 1:].to(images.dtype).transpose(1, 2)
                maps.append(tapped.unflatten(2, grid).contiguous())
        return tuple(maps)


def _dtype(name):
    if name in FORMATS:
        check_format(name)
        return torch.bfloat16
    if name not in DTYPES:
        known = suggest(str(name), [*DTYPES, *FORMATS])
        raise UsageError(f'InternViT: frozen_dtype={name!r} is unknown. {known}')
    return DTYPES[name]


def _quantized(block, bits):
    """A block with the weights of its linear layers in a format; as it is if that is None."""
    for layer in block.modules() if bits else ():
        if isinstance(layer, nn.Linear) and can_quantize(layer.weight, bits):
            layer.weight = nn.Parameter(quantize(layer.weight, bits), requires_grad=False)
    return block


def _taps(depth, out_indices):
    if out_indices is None:
        out_indices = {max(depth * part // 4 - 1, 0) for part in (1, 2, 3, 4)}
    taps = tuple(sorted(out_indices))
    if not taps or taps[0] < 0 or taps[-1] >= depth:
        raise UsageError(f'InternViT: out_indices={taps} must be blocks from 0 to {depth - 1}.')
    return taps


@contextmanager
def _building(dtype: torch.dtype, empty: bool) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device('meta' if empty else torch.get_default_device()):
            yield
    finally:
        torch.set_default_dtype(before)
