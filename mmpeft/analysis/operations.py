"""Floating-point operations of matrix products, convolutions and attention.

torch's own formulas, but for what it counts wrongly or not at all: the kernel
gradient of a grouped convolution, products in place, attention and oneDNN's
products on a CPU. A multiply-add counts as two. Kernels that are opaque to
torch, such as Triton's, count nothing.
"""

from math import prod

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


class Operations(TorchDispatchMode):
    """Counts while the context lasts, in forward and backward alike.

    Attributes:
        count: Operations so far.
    """

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        formula = OWN.get(packet) or flop_registry.get(packet)
        if formula is not None:
            self.count += formula(*args, **kwargs, out_val=out)
        return out


def convolution_backward(dy, x, weight, *args, **kwargs):
    """Each of the two gradients costs what forward does."""
    transposed, mask = args[4], args[7]
    positions = prod((x if transposed else dy).shape[2:])
    return 2 * len(x) * positions * weight.numel() * sum(mask[:2])


def accumulated(y, left, right, **kwargs):
    """Of the product that is added."""
    return 2 * left.numel() * right.shape[-1]


def onednn_linear(x, weight, *args, **kwargs):
    """As of any product of matrices."""
    return 2 * x.numel() * len(weight)


def attention(q, k, v, *args, **kwargs):
    """Two products of tokens by tokens."""
    return 2 * prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])


def attention_backward(dy, q, k, v, *args, **kwargs):
    """The scores again, and two gradients of each of the two products."""
    return 2 * prod(q.shape[:-1]) * k.shape[-2] * (3 * q.shape[-1] + 2 * v.shape[-1])


OWN = {
    aten.addmm_: accumulated,
    aten.baddbmm_: accumulated,
    aten.convolution_backward: convolution_backward,
    aten._scaled_dot_product_flash_attention_for_cpu: attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}
if hasattr(torch.ops.mkldnn, '_linear_pointwise'):
    OWN[torch.ops.mkldnn._linear_pointwise] = onednn_linear
