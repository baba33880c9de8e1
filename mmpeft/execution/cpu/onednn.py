"""Products in float32 by oneDNN.

torch itself uses MKL, which leaves half the AVX-512 units of processors that Intel did not make
unused. On Intel's, and where there are no such units, MKL is as fast or faster.
Shapes are those of :mod:`mmpeft.execution.matmul`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from mmpeft.execution.checkpointing import save_first

AMX = torch.cpu._is_amx_tile_supported()  # Intel's alone have it.
IS_FASTER = 'AVX512' in torch.backends.cpu.get_cpu_capability() and not AMX
# Multiply-adds below which oneDNN's preparation takes longer than the product.
SMALL_PRODUCT = 2**21
# Columns up to which it computes a product faster transposed.
THIN = 128


def pays(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN computes the product of a map of I channels and a matrix (O, I) faster."""
    return (
        IS_FASTER
        and x.is_cpu
        and x.numel() * weight.shape[0] >= SMALL_PRODUCT
        and x.dtype == weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, '_linear_pointwise')
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b for x (..., I), W (O, I) with any strides and b (O,)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'none', [], '')


def channels_first(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A map (N, I, T) through a matrix (O, I), plus a bias (O,): (N, O, T)."""
    if len(x) == 1 and bias is None:
        positions_are_few = x.shape[2] * sum(weight.shape) < weight.numel()
        if positions_are_few and not weight.is_contiguous():
            return linear(x[0].T, weight).T.contiguous()[None]
        return linear(weight, x[0].T)[None]
    # oneDNN reads a transposed matrix several times slower.
    if weight.is_contiguous():
        return F.conv1d(x, weight.unsqueeze(2), bias)
    return F.conv_transpose1d(x, weight.T.unsqueeze(2), bias)


def weight_grad(dy: Tensor, x: Tensor) -> Tensor:
    """dy (O, T) times x (I, T), over T: (O, I)."""
    is_thin = len(x) <= THIN or dy.shape[1] >= len(dy)
    if len(x) < len(dy) and is_thin:
        return linear(x, dy).T
    return linear(dy, x)


class FrozenLinear(Function):
    """y = x W^T + b for x (..., I), frozen W (O, I) and b (O,) or None: (..., O)."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.saved_first = save_first(weight)
        if ctx.saved_first is None:
            ctx.save_for_backward(weight)
        return linear(x, weight, bias).data  # no view, which in-place activations refuse

    @staticmethod
    def backward(ctx, dy):
        (weight,) = (ctx.saved_first or ctx).saved_tensors
        return FrozenLinear.apply(dy, weight.T, None), None, None
