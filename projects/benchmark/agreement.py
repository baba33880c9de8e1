"""Methods on layers and small networks, on a device and in a precision, against float64 on the CPU.

Both sides have the same numbers: a model is built, adapted and moved off its start in its own
dtype. The reference is a copy in float64 that torch's parametrize computes on the CPU. What is
compared is the output and every gradient: of the input and of all that trains.
"""

import copy
import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import partial

import torch
from timm.models.convnext import ConvNeXt
from timm.models.resnet import Bottleneck, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import mmpeft
from mmpeft import execution
from mmpeft.engine.method_argument import method_files, methods_in, read_method
from mmpeft.errors import UsageError
from mmpeft.injection.site import adapter_parameters

# Small layers have small ranks; what draws random numbers draws others on another device; and on
# the two sides of a ReLU's kink gradients differ.
ARGUMENTS = dict(rank=4, sample=False, dropout=0.0, activation='gelu')
PERTURBATION = 0.02
# Gradients that nearly cancel are measured by the largest one of the model.
NEGLIGIBLE = 0.1
# Of the upstream gradient, so that float16 holds what reaches the input.
LOSS_SCALE = 64


@dataclass(frozen=True)
class Kind:
    """A layer or network, and the size of its input; ``entries`` are those of an embedding."""

    make: Callable[[], nn.Module]
    size: tuple[int, ...]
    entries: int = 0

    def input(self, dtype: torch.dtype) -> Tensor:
        """The same random numbers, or indices, each time."""
        generator = torch.Generator().manual_seed(1)
        if self.entries:
            return torch.randint(self.entries, self.size, generator=generator)
        return torch.randn(self.size, generator=generator).to(dtype)


class SelfAttention(nn.MultiheadAttention):
    """On one input."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, C) to (N, L, C)."""
        return super().forward(x, x, x, need_weights=False)[0]


IMAGES = 2, 3, 32, 32
LAYERS = dict(
    linear=Kind(partial(nn.Linear, 48, 64), (4, 65, 48)),
    pointwise=Kind(partial(nn.Conv2d, 32, 48, 1), (2, 32, 9, 9)),
    conv=Kind(partial(nn.Conv2d, 16, 24, 3, stride=2, padding=1), (2, 16, 15, 15)),
    grouped=Kind(partial(nn.Conv2d, 16, 24, 3, padding=1, groups=4), (2, 16, 9, 9)),
    depthwise=Kind(partial(nn.Conv2d, 32, 32, 7, padding=3, groups=32), (2, 32, 14, 14)),
    conv1d=Kind(partial(nn.Conv1d, 16, 24, 3, padding=1), (2, 16, 33)),
    conv3d=Kind(partial(nn.Conv3d, 8, 12, 3, padding=1), (1, 8, 5, 6, 6)),
    transposed=Kind(partial(nn.ConvTranspose2d, 16, 24, 2, stride=2), (2, 16, 7, 7)),
    embedding=Kind(partial(nn.Embedding, 40, 32), (4, 9), entries=40),
    attention=Kind(partial(SelfAttention, 32, 4, batch_first=True), (2, 17, 32)),
)
NETWORKS = dict(
    # Without class token and positions, whose small numbers a norm enlarges, and their errors.
    vit=Kind(
        partial(
            *(VisionTransformer, 32, 8),
            **dict(embed_dim=48, depth=2, num_heads=3, num_classes=8, mlp_ratio=2),
            **dict(class_token=False, global_pool='avg', pos_embed='none'),
        ),
        IMAGES,
    ),
    convnextv2=Kind(
        partial(
            *(ConvNeXt, 3, 8),
            **dict(depths=(1, 1, 1, 1), dims=(16, 24, 24, 24), use_grn=True, ls_init_value=None),
        ),
        IMAGES,
    ),
    # Residual branches start at zero otherwise.
    resnet=Kind(
        partial(
            *(ResNet, Bottleneck, (1, 1, 1, 1), 8),
            **dict(channels=(8, 16, 16, 16), act_layer=nn.SiLU, zero_init_last=False),
        ),
        (4, 3, 64, 64),  # enough positions for the statistics of full fine-tuning
    ),
)
KINDS = LAYERS | NETWORKS
MAPS = 'pointwise', 'conv', 'grouped', 'depthwise', 'transposed', 'convnextv2', 'resnet'


@dataclass(frozen=True)
class Setting:
    """How a model is computed.

    Attributes:
        dtype: Of frozen weights and inputs.
        amp: Of autocast.
        rounding: The largest relative error of one rounding, 2^-p with p significant bits.
        tf32: Whether products in float32 may be rounded to 11 bits.
        kinds: What is compared.
        channels_last: The layout of maps.
        compiled: By ``torch.compile``.
    """

    dtype: torch.dtype = torch.float32
    amp: torch.dtype | None = None
    rounding: float = 2**-24
    tf32: bool = False
    kinds: tuple[str, ...] = tuple(KINDS)
    channels_last: bool = False
    compiled: bool = False

    def tolerance(self, kind: str) -> float:
        """The relative difference allowed, in the Euclidean norm of each tensor.

        In a layer a few roundings, some of them of a weight that others multiply, make up to 10
        of one; in two blocks and the gradients through them they add up to several times that.
        In float32, sums of up to 10^4 products and the decompositions of methods count too, which
        lower precisions accumulate in float32.
        """
        roundings = 16 if kind in LAYERS else 64
        return roundings * self.rounding * (16 if self.rounding < 2**-20 else 1)


SETTINGS = dict(
    float32=Setting(),
    tf32=Setting(rounding=2**-11, tf32=True),
    bfloat16=Setting(torch.bfloat16, rounding=2**-8),
    float16=Setting(torch.float16, rounding=2**-11),
    autocast=Setting(amp=torch.bfloat16, rounding=2**-8),
    channels_last=Setting(kinds=MAPS, channels_last=True),
    compiled=Setting(kinds=('linear', 'pointwise', 'conv', 'depthwise', 'vit'), compiled=True),
)
# First those whose kernels differ; a time limit cuts the others off.
FIRST = 'flora', 'lora', 'liera', 'dora', 'ia3', 'houlsby'


def methods() -> list[str]:
    """The methods that have a config, :data:`FIRST` first."""
    return [*FIRST, *(name for name in method_files() if name not in FIRST)]


class Reference:
    """Models and what they compute in float64; each is built once for a dtype."""

    def __init__(self):
        self.known = {}

    def __call__(self, method: str, kind: str, dtype: torch.dtype):
        """The adapted model on the CPU, and its results in float64; None without a place."""
        key = method, kind, dtype
        if key not in self.known:
            try:
                model = _adapted(method, KINDS[kind], dtype)
                self.known[key] = model, _reference(model, KINDS[kind].input(dtype))
            except UsageError:  # the method has no place in it
                self.known[key] = None
        return self.known[key]


def compare(model: nn.Module, expected: dict[str, Tensor], kind: str, setting: Setting, device):
    """The largest relative difference over output and gradients, and the tensor that has it.

    Args:
        model: On the CPU; a copy is computed.
        expected: See :func:`results`.
        kind: A key of :data:`KINDS`.
        setting: How it is computed.
        device: Where.
    """
    model = copy.deepcopy(model).to(device)
    x = KINDS[kind].input(setting.dtype).to(device)
    if setting.channels_last:
        model, x = (t.to(memory_format=torch.channels_last) for t in (model, x))
    run = model
    if setting.compiled:
        torch.compiler.reset()
        run = torch.compile(model, backend='inductor' if device == 'cuda' else 'aot_eager')
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = setting.tf32
    try:
        with torch.autocast(device, setting.amp) if setting.amp else nullcontext():
            y, leaves = _forward(run, model, x)
        found = _gradients(y, leaves)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    largest = max((t.norm() for name, t in expected.items() if name != 'y'), default=0)
    differences = {
        name: _relative(found[name], value, 0 if name == 'y' else NEGLIGIBLE * largest)
        for name, value in expected.items()
    }
    # max() would pass over NaN.
    worst = max(differences, key=lambda name: _ordered(differences[name]))
    return differences[worst], worst


def _ordered(value):
    return math.inf if math.isnan(value) else value


def _adapted(method, kind, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(kind.make()).to(dtype)
    hook = read_method(method)
    (config,) = methods_in(hook)
    known = {field.name for field in fields(mmpeft.METHODS.get(config['type']))}
    config = config | {name: value for name, value in ARGUMENTS.items() if name in known}
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', '.*adapters have more parameters')
        warnings.filterwarnings('ignore', '.*belong to no layer that is known')
        mmpeft.inject(model, config, hook.get('targets'), hook.get('unfreeze', ()))
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.add_(torch.randn_like(parameter) * PERTURBATION)
    return model


def _reference(model, x):
    plain = copy.deepcopy(model).double()
    for module in plain.modules():
        execution.disable(module)
    return _gradients(*_forward(plain, plain, x.double() if x.is_floating_point() else x))


def _forward(run, model, x):
    """The output, and the tensors whose gradients are compared."""
    leaves = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if x.is_floating_point():
        leaves['x'] = x = x.detach().requires_grad_()
    return run(x), leaves


def _gradients(y, leaves):
    generator = torch.Generator().manual_seed(2)
    upstream = LOSS_SCALE * torch.randn(y.shape, generator=generator, dtype=torch.float64)
    gradients = [None] * len(leaves)
    if leaves and y.requires_grad:
        gradients = torch.autograd.grad(
            y, leaves.values(), upstream.to(y.device, y.dtype), allow_unused=True
        )
    found = {name: g for name, g in zip(leaves, gradients, strict=True) if g is not None}
    return {name: t.detach().double().cpu() for name, t in (dict(y=y) | found).items()}


def _relative(found, expected, least):
    return float((found - expected).norm() / max(expected.norm(), least, 1e-30))
