"""Which kernel each adapted layer runs for an input, and what its adapter costs."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils import parametrize

from mmpeft.execution.layers import is_enabled
from mmpeft.execution.select import select_kernel

from .operations import Operations


@dataclass(frozen=True)
class Explanation:
    """One adapted layer under one input.

    Attributes:
        path: Of the layer.
        kind: Its class.
        tokens: Positions of the output, over the batch.
        kernel: What computes the output.
        floor: Multiply-adds of forward and of the input's gradient.
        extra: Multiply-adds that training the adapter adds to them.
    """

    path: str
    kind: str
    tokens: int
    kernel: str
    floor: int
    extra: int

    @property
    def ratio(self) -> float:
        """Multiply-adds of a training step over the floor's."""
        return 1 + self.extra / max(self.floor, 1)


def explain(model: nn.Module, forward: Callable[[], object]) -> list[Explanation]:
    """Each use of an adapted linear layer or convolution in a forward pass, in order.

    Args:
        model: After :func:`mmpeft.inject`.
        forward: Runs the model once, such as ``lambda: model(images)``; fake
            tensors will do.
    """
    found = []

    def watch(path):
        return lambda layer, args, output: found.append(_explained(path, layer, args[0], output))

    with ExitStack() as stack, torch.enable_grad():
        for path, layer in model.named_modules():
            if parametrize.is_parametrized(layer, 'weight') and _multiplies(layer):
                stack.callback(layer.register_forward_hook(watch(path)).remove)
        forward()
    return found


def _explained(path, layer, x, y):
    kernel = select_kernel(layer, x) if is_enabled(layer) else None
    name, spec = kernel.name if kernel else 'weight built', layer.parametrizations.weight[0].spec
    floor = 2 * _positions(x if spec.transposed else y, layer) * spec.numel
    extra = _multiply_adds(layer, x) - floor
    return Explanation(path, type(layer).__name__, _positions(y, layer), name, floor, extra)


def _multiplies(layer):
    """Whether it is a linear layer or a convolution."""
    kinds = layer.parametrizations.weight[0].spec.kinds
    return not isinstance(layer, nn.MultiheadAttention) and bool(kinds & {'linear', 'conv'})


def _positions(x, layer):
    return x.numel() // x.shape[1 if isinstance(layer, nn.modules.conv._ConvNd) else -1]


def _multiply_adds(layer, x):
    """Of forward and backward, counted on tensors without data."""
    fake = x.fake_mode if isinstance(x, FakeTensor) else FakeTensorMode(allow_non_fake_inputs=True)
    trained = [p for p in layer.parameters() if p.requires_grad]
    with fake, Operations() as operations:
        x = torch.empty_like(x, requires_grad=True)
        y = type(layer).forward(layer, x)
        torch.autograd.grad(y, [x, *trained], torch.ones_like(y), allow_unused=True)
    return operations.count // 2
