"""Frozen layers between the adapted ones: they need no gradient of their own."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function

from mmpeft.quantization import Quantized

from .activations import (
    FrozenGELU,
    FrozenHardswish,
    FrozenHardtanh,
    FrozenMish,
    FrozenSiLU,
    FrozenSwish,
    Recomputable,
    is_away_later,
    is_passed_through,
)
from .classes import Fast, forward_owner
from .cpu import onednn
from .gated import FrozenGate
from .matmul import linear
from .recompute import offer_product
from .response_norm import response_norm


class FrozenLinear(Fast):
    """A linear layer without adapter."""

    def forward(self, input):
        if not is_passed_through(self, input) or isinstance(self.weight, Quantized):
            return super().forward(input)
        autocast = torch.is_autocast_enabled(input.device.type)
        if autocast or not onednn.pays(input, self.weight):
            y = super().forward(input)
        else:
            y = onednn.FrozenLinear.apply(input, self.weight, self.bias)
        if self.out_features > self.in_features and not is_away_later(self):
            offer_product(y, partial(_linear, y.dtype), input, self.weight, self.bias)
        return y


class FrozenResponseNorm(Fast):
    """timm's global response normalization."""

    def forward(self, x):
        if x.ndim != 4 or is_away_later(self) or not is_passed_through(self, x):
            return super().forward(x)
        return response_norm(x, self.weight, self.bias, self.eps, self.channel_dim)


class FrozenBatchNorm(Fast):
    """A batch norm in evaluation mode."""

    def forward(self, input):
        norm = super().forward
        return _affine(self, norm, input) if _is_affine(self, input) else norm(input)


class FrozenBatchNormAct(Fast):
    """timm's batch norm and the activation behind it, which are one module."""

    def forward(self, x):
        if not _is_affine(self, x):
            return super().forward(x)
        return self.act(self.drop(_affine(self, self._norm, x)))

    def _norm(self, x):
        statistics = self.running_mean, self.running_var
        return F.batch_norm(x, *statistics, self.weight, self.bias, eps=self.eps)


class ChannelAffine(Function):
    """A norm by running statistics is affine by channel: backward needs no map.

    Shapes: ``x`` (N, C, *size) and the same for the result; ``weight`` (C,) or None, and
    ``variance`` (C,), both frozen. ``norm`` is the function itself.
    """

    @staticmethod
    def forward(ctx, x, norm, weight, variance, eps):
        ctx.save_for_backward(weight, variance)
        ctx.eps = eps
        return norm(x)

    @staticmethod
    def backward(ctx, dy):
        weight, variance = ctx.saved_tensors
        dx = F.batch_norm(dy, torch.zeros_like(variance), variance, weight, eps=ctx.eps)
        return dx, None, None, None, None


def _is_affine(norm, x):
    return not norm.training and norm.running_var is not None and is_passed_through(norm, x)


def _affine(layer, norm, x):
    return ChannelAffine.apply(x, norm, layer.weight, layer.running_var, layer.eps)


def _linear(dtype, x, weight, bias):
    bias = None if bias is None else bias.to(dtype)
    return linear(x.to(dtype), weight.to(dtype), bias)


KINDS = {
    'torch.nn.modules.linear.Linear': FrozenLinear,
    'timm.layers.grn.GlobalResponseNorm': FrozenResponseNorm,
    'torch.nn.modules.batchnorm._BatchNorm': FrozenBatchNorm,
    'torch.nn.modules.batchnorm.SyncBatchNorm': FrozenBatchNorm,
    'timm.layers.norm_act.BatchNormAct2d': FrozenBatchNormAct,
    'torch.nn.modules.normalization.LayerNorm': Recomputable,
    'torch.nn.modules.normalization.RMSNorm': Recomputable,
    'timm.layers.norm.LayerNorm': Recomputable,
    'timm.layers.norm.LayerNorm2d': Recomputable,
    'timm.layers.norm.RmsNorm': Recomputable,
    'torch.nn.modules.activation.GELU': FrozenGELU,
    'timm.layers.activations.GELU': FrozenGELU,
    'torch.nn.modules.activation.SiLU': FrozenSiLU,
    'mmcv.cnn.bricks.swish.Swish': FrozenSwish,
    'torch.nn.modules.activation.Hardswish': FrozenHardswish,
    'torch.nn.modules.activation.Mish': FrozenMish,
    'torch.nn.modules.activation.Hardtanh': FrozenHardtanh,
    'torch.nn.modules.activation.LeakyReLU': Recomputable,
    'timm.layers.squeeze_excite.SEModule': FrozenGate,
    'timm.layers.squeeze_excite.EffectiveSEModule': FrozenGate,
    'timm.models._efficientnet_blocks.SqueezeExcite': FrozenGate,
    'torchvision.ops.misc.SqueezeExcitation': FrozenGate,
    'mmdet.models.layers.se_layer.SELayer': FrozenGate,
    'mmpretrain.models.utils.se_layer.SELayer': FrozenGate,
    'mmseg.models.utils.se_layer.SELayer': FrozenGate,
    'timm.layers.mlp.GluMlp': FrozenGate,
    'timm.layers.mlp.SwiGLU': FrozenGate,
    'mmpretrain.models.utils.swiglu_ffn.SwiGLUFFN': FrozenGate,
    'transformers.models.dinov2.modeling_dinov2.Dinov2SwiGLUFFN': FrozenGate,
    'transformers.activations.SiLUActivation': FrozenSiLU,
}


# As the layers of a gated MLP are called in LLaMA and most of transformers' models since.
GATED_MLP = {'gate_proj', 'up_proj', 'down_proj'}


def kind_for(layer: nn.Module) -> type | None:
    """Which of the classes above fits a layer, by the class that defines its ``forward``."""
    if layer._modules.keys() >= GATED_MLP:
        return FrozenGate
    owner = forward_owner(type(layer))
    return KINDS.get(f'{owner.__module__}.{owner.__qualname__}')
