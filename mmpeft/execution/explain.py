"""What each adapted layer does with an input, and what its adapter costs."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import nn
from torch.nn.utils import parametrize

from .layers import is_enabled
from .matrix import thin_pays
from .ways import DEPTHWISE, KERNEL, MATRIX, choose

BUILT = 'weight built'


@dataclass(frozen=True)
class Explanation:
    """One adapted layer under one input.

    Attributes:
        path: Of the layer.
        kind: Class of the layer.
        tokens: Positions of the output, over the batch.
        way: Which way was taken, or that the weight is built.
        floor: Multiply-adds of forward and of the input's gradient.
        extra: Multiply-adds that training the adapter adds to them.
    """

    path: str
    kind: str
    tokens: int
    way: str
    floor: int
    extra: int

    @property
    def ratio(self) -> float:
        """Multiply-adds of a training step over the floor's."""
        return 1 + self.extra / max(self.floor, 1)


def explain(model: nn.Module, forward: Callable[[], object]) -> list[Explanation]:
    """Watch a forward pass and tell which way each adapted layer takes.

    Args:
        model: After :func:`mmpeft.inject`.
        forward: Runs the model once, such as ``lambda: model(images)``; fake
            tensors will do.

    Returns:
        One entry for each use of an adapted layer, in the order of use.
    """
    found, handles = [], []

    def watch(path):
        def hook(layer, args, output):
            found.append(_explained(path, layer, args[0], output))

        return hook

    for path, layer in model.named_modules():
        adapted = parametrize.is_parametrized(layer, 'weight')
        if adapted and isinstance(layer, nn.Linear | nn.modules.conv._ConvNd):
            handles.append(layer.register_forward_hook(watch(path)))
    try:
        with torch.enable_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _explained(path, layer, x, y):
    spec = layer.parametrizations.weight[0].spec
    chosen = choose(layer, x) if is_enabled(layer) else None
    way, thin = chosen or (None, None)
    positions = y.numel() // (y.shape[-1] if isinstance(layer, nn.Linear) else y.shape[1])
    dense = positions * spec.numel
    if way is MATRIX:
        rank = _width(thin)
        out, features = spec.shape[:2]
        pays = thin_pays((out, features), rank)
        extra = 2 * positions * rank * (out + features) if pays else dense
        name = way.name if pays else 'dense gradient, nothing kept'
    elif way is KERNEL:
        up, core, down = thin
        taps = prod(spec.kernel_size)
        whole = core is None or down is None  # V is the kernel itself
        inner = up.shape[1] * (spec.shape[1] if whole else down.shape[0])
        extra = positions * (2 * sum(spec.shape[:2]) * up.shape[1] + 3 * taps * inner)
        name = way.name
    else:
        extra, name = dense, way.name if way is DEPTHWISE else BUILT
    return Explanation(path, type(layer).__name__, positions, name, 2 * dense, extra)


def _width(thin):
    up, core, _ = thin
    return up.shape[1] if core is None else core.shape[1]
