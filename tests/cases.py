"""The tables that the invariants run over: methods, and the layers and networks that they adapt."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# A new method: one line here. Every registered method must have one.
METHODS = dict(
    flora=dict(type='FLoRA', rank=2, kernel_rank=2, scale=4.0),
    flora_modes=dict(type='FLoRA', rank=(2, 3), kernel_rank=1, scale=0.4, init_std=0.5),
    flora_lie=dict(type='FLoRA', rank=2, update='lie'),
    flora_lie_exact=dict(type='FLoRA', rank=2, scale=0.4, update='lie_exact'),
    lora=dict(type='LoRA', rank=2, layout='loralib'),
    lora_channel=dict(type='LoRA', rank=2, alpha=8),
    lora_mpc_o=dict(type='LoRA', rank=2, mpc='o'),
    lora_mpc_d=dict(type='LoRA', rank=2, mpc='d', mpc_weight=0.5),
    trilora=dict(type='TriLoRA', rank=2, scale=2.0, layout='loralib'),
    trilora_mpc_o=dict(type='TriLoRA', rank=2, init_std=0.5, mpc='o'),
    moslora=dict(type='MoSLoRA', rank=2, layout='loralib'),
    moslora_orthogonal=dict(type='MoSLoRA', rank=2, mixer_init='orthogonal'),
    vera=dict(type='VeRA', rank=3),
    vera_loralib=dict(type='VeRA', rank=2, d_initial=0.5, seed=7, layout='loralib'),
    lotr=dict(type='LoTR', rank=3),
    lotr_lie=dict(type='LoTR', rank=2, scale=0.4, update='lie'),
    liera=dict(type='LieRA', rank=2, scale=2.0),
    liera_exact=dict(type='LieRA', rank=2, scale=1.0, update='lie_exact'),
    loha=dict(type='LoHa', rank=2, layout='tucker'),
    loha_channel=dict(type='LoHa', rank=2, alpha=4, update='lie'),
    lokr=dict(type='LoKr', rank=1, layout='tucker'),
    lokr_both=dict(type='LoKr', rank=1, decompose_both=True),
    lokr_scaled=dict(type='LoKr', rank=2, scale=0.5, factor=1, layout='tucker'),
    dora=dict(type='DoRA', rank=2, layout='loralib'),
    dora_lie=dict(type='DoRA', rank=2, update='lie'),
    ia3=dict(type='IA3'),
    ssl=dict(type='SSL'),
    ssb=dict(type='SSB'),
    ssf=dict(type='SSF'),
    sam_parser=dict(type='SAMPARSER'),
    sam_parser_leading=dict(type='SAMPARSER', rank=2),
    svdiff=dict(type='SVDiff'),
    svdiff_leading=dict(type='SVDiff', rank=3),
    pissa=dict(type='PiSSA', rank=2),
    pissa_fast=dict(type='PiSSA', rank=2, alpha=8, niter=2),
    pissa_lie=dict(type='PiSSA', rank=2, update='lie'),
    pissa_loralib=dict(type='PiSSA', rank=1, layout='loralib'),
    milora=dict(type='MiLoRA', rank=2, scale=0.5),
    spectral=dict(type='SpectralAdapter', rank=2),
    adalora=dict(type='AdaLoRA', rank=2, layout='loralib'),
    adalora_lie=dict(type='AdaLoRA', rank=2, init_rank=4, update='lie'),
    diff_pruning=dict(type='DiffPruning', start=0.6, gate_speed=1.0, sample=False),
    diff_pruning_structured=dict(
        type='DiffPruning', structured=True, start=0.6, gate_speed=1.0, sample=False
    ),
    fish=dict(type='FISH', density=0.2, samples=2),
    pafi=dict(type='PaFi', density=0.2),
    oft=dict(type='OFT', block_size=3),
    boft=dict(type='BOFT', block_size=2, factors=2),
    rep_adapter=dict(type='RepAdapter', rank=2, scale=0.5),
    fact=dict(type='FacT', rank=2),
    fact_tk=dict(type='FacT', rank=3, form='tk', update='lie'),
    miss=dict(type='MiSS', rank=2),
    shira=dict(type='SHiRA', density=0.2),
    randlora=dict(type='RandLoRA', rank=2, scale=2.0),
    filter_atoms=dict(type='FilterAtoms', block=3),
    ditask=dict(type='DiTASK', cells=5),
    houlsby=dict(type='HoulsbyAdapter', rank=2),
    pfeiffer=dict(type='PfeifferAdapter', rank=3, activation='swish'),
    parallel=dict(type='ParallelAdapter', rank=2),
    parallel_smooth=dict(type='ParallelAdapter', rank=3, activation='gelu', scale=0.5),
    scaled_parallel=dict(type='ScaledParallelAdapter', rank=2),
    vpt=dict(type='VPT', tokens=3),
    vpt_deep=dict(type='VPT', tokens=2, deep=True),
    mona=dict(type='Mona', rank=2),
    adaptformer=dict(type='AdaptFormer', rank=2),
    convpass=dict(type='Convpass', rank=2),
    conv_adapter=dict(type='ConvAdapter', reduction=2),
    bitfit=dict(type='BitFit'),
    frozen=dict(type='Frozen'),
    full=dict(type='Full'),
)

# One of each kind, for what needs no full product.
FAMILIES = (
    *('flora', 'lora_channel', 'liera', 'dora', 'pissa', 'vera', 'adalora', 'svdiff', 'ssb'),
    *('diff_pruning', 'fish', 'bitfit', 'houlsby', 'vpt', 'full', 'frozen'),
)


@dataclass(frozen=True)
class Layer:
    """A layer and an input for it.

    Attributes:
        make: Builds the layer.
        size: Of the input.
        entries: Of an embedding, whose input is indices below it.
    """

    make: Any
    size: tuple[int, ...]
    entries: int = 0

    def build(self, dtype=torch.float64):
        return nn.Sequential(self.make()).to(dtype)

    def input(self, dtype=torch.float64):
        if self.entries:
            return torch.randint(self.entries, self.size)
        return torch.randn(self.size, dtype=dtype)


class SelfAttention(nn.Module):
    """nn.MultiheadAttention on one input; ``**kwargs`` as there."""

    def __init__(self, **kwargs):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True, **kwargs)
        nn.init.normal_(self.attn.in_proj_bias)  # the scale of a bias of zeros would never move
        self.memory = kwargs.get('kdim', 8)

    def forward(self, x):
        memory = x[..., : self.memory]
        return self.attn(x, memory, memory)[0]


class WithBias(nn.Module):
    """An embedding has no bias of its own; BitFit needs one."""

    def __init__(self, embedding):
        super().__init__()
        self.embedding = embedding
        self.norm = nn.LayerNorm(6)

    def forward(self, index):
        return self.norm(self.embedding(index))


LAYERS = dict(
    linear=Layer(lambda: nn.Linear(6, 5), (3, 4, 6)),
    conv1d=Layer(lambda: nn.Conv1d(4, 6, 3, dilation=2, groups=2), (2, 4, 9)),
    conv2d=Layer(lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 7)),
    conv2d_wide=Layer(lambda: nn.Conv2d(3, 4, (3, 5), padding='same'), (2, 3, 6, 7)),
    conv2d_1x1=Layer(lambda: nn.Conv2d(4, 6, 1), (2, 4, 5, 5)),
    conv2d_circular=Layer(
        lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2, padding_mode='circular'),
        (2, 4, 6, 6),
    ),
    conv2d_reflect=Layer(
        lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode='reflect'), (2, 4, 6, 6)
    ),
    depthwise=Layer(lambda: nn.Conv2d(6, 6, 7, padding=3, groups=6), (1, 6, 8, 8)),
    depthwise_multiplied=Layer(lambda: nn.Conv2d(3, 6, 3, groups=3), (1, 3, 6, 6)),
    conv3d=Layer(lambda: nn.Conv3d(2, 4, (1, 3, 2)), (1, 2, 3, 5, 5)),
    transposed1d=Layer(lambda: nn.ConvTranspose1d(4, 6, 4, stride=2, groups=2), (2, 4, 5)),
    transposed2d=Layer(
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2, dilation=2),
        (1, 4, 4, 4),
    ),
    transposed2d_plain=Layer(lambda: nn.ConvTranspose2d(3, 5, 2, stride=2), (1, 3, 4, 4)),
    transposed3d=Layer(lambda: nn.ConvTranspose3d(2, 3, 2), (1, 2, 3, 3, 3)),
    embedding=Layer(lambda: WithBias(nn.Embedding(7, 6, padding_idx=2)), (3, 4), entries=7),
    attention=Layer(SelfAttention, (2, 5, 8)),
    attention_kdim=Layer(lambda: SelfAttention(kdim=4, vdim=4), (2, 5, 8)),
)
KINDS = ('conv', 'linear', 'embedding')


class Attention(nn.Module):
    """Of four heads; over all tokens, or with a table of positions as over windows."""

    def __init__(self, width, window=0):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        if window:
            self.relative_position_bias_table = nn.Parameter(torch.randn(window, window))

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / q.shape[-1] ** 0.5 + getattr(self, 'relative_position_bias_table', 0)
        y = scores.softmax(-1) @ v
        return self.proj(y.transpose(1, 2).flatten(2))


class TorchAttention(nn.MultiheadAttention):
    """Returns a tuple."""

    def __init__(self, width):
        super().__init__(width, 4, batch_first=True)

    def forward(self, x):
        return super().forward(x, x, x)


def mlp(width):
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class TransformerBlock(nn.Module):
    def __init__(self, attention, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = attention, mlp(width)

    def attend(self, x):
        y = self.attn(x)
        return y[0] if isinstance(y, tuple) else y

    def forward(self, x):
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class WindowBlock(TransformerBlock):
    """On (N, H, W, C) with windows of 2x2."""

    def __init__(self, width):
        super().__init__(Attention(width, window=4), width)

    def attend(self, x):
        n, h, w, c = x.shape
        windows = x.view(n, h // 2, 2, w // 2, 2, c).transpose(2, 3).reshape(-1, 4, c)
        y = super().attend(windows)
        return y.view(n, h // 2, w // 2, 2, 2, c).transpose(2, 3).reshape(x.shape)


class Patches(nn.Module):
    """Cuts images into channels-last maps, or sequences, of patches of 2x2."""

    def __init__(self, width, flat):
        super().__init__()
        self.proj = nn.Conv2d(3, width, 2, 2)
        self.flat = flat

    def forward(self, x):
        y = self.proj(x).permute(0, 2, 3, 1)
        return y.flatten(1, 2) if self.flat else y


class ConvNeXtBlock(nn.Module):
    def __init__(self, width, channels_last):
        super().__init__()
        self.conv_dw = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = nn.GroupNorm(1, width)
        self.channels_last = channels_last
        self.mlp = mlp(width) if channels_last else conv_mlp(width)

    def forward(self, x):
        y = self.norm(self.conv_dw(x))
        if self.channels_last:
            return x + self.mlp(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x + self.mlp(y)


def conv_mlp(width):
    return nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.GELU(), nn.Conv2d(2 * width, width, 1))


class Bottleneck(nn.Module):
    """ResNeXt's, with a shortcut where it changes the map."""

    def __init__(self, width, out, stride):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, 4, 1), nn.GroupNorm(1, 4)
        self.conv2 = nn.Conv2d(4, 4, 3, stride, padding=1, groups=2)
        self.norm2 = nn.GroupNorm(1, 4)
        self.conv3, self.norm3 = nn.Conv2d(4, out, 1), nn.GroupNorm(1, out)
        changes = width != out or stride != 1
        self.downsample = nn.Sequential(nn.Conv2d(width, out, 1, stride)) if changes else None

    def forward(self, x):
        y = self.norm1(self.conv1(x)).tanh()
        y = self.norm2(self.conv2(y)).tanh()
        y = self.norm3(self.conv3(y))
        return (y + (x if self.downsample is None else self.downsample(x))).tanh()


# Small networks for methods that act on activations.
BLOCKS = dict(
    vit=Layer(
        lambda: nn.Sequential(
            Patches(8, flat=True),
            TransformerBlock(Attention(8), 8),
            TransformerBlock(TorchAttention(8), 8),
        ),
        (2, 3, 4, 6),
    ),
    convnext=Layer(
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 2, 2),
            ConvNeXtBlock(6, channels_last=True),
            ConvNeXtBlock(6, channels_last=False),
        ),
        (2, 3, 8, 6),
    ),
    resnet=Layer(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), Bottleneck(4, 6, 2), Bottleneck(6, 6, 1)),
        (2, 3, 8, 7),
    ),
    swin=Layer(
        lambda: nn.Sequential(Patches(8, flat=False), WindowBlock(8), WindowBlock(8)),
        (2, 3, 8, 4),
    ),
)
# Networks and layers without a place for a method, and networks where it starts otherwise.
NO_PLACE = {
    *((method, 'resnet') for method in ('ScaledParallelAdapter', 'AdaptFormer', 'Convpass')),
    ('VPT', 'swin'),
    ('DiTASK', 'transposed3d'),
}
NO_IDENTITY = {('VPT', 'vit')}


def randomize(model, std=0.3):
    """Move all adapters off their start, as training would."""
    from mmpeft.injection.site import adapter_parameters

    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.add_(torch.randn_like(parameter) * std)
