"""What each adapted layer does with an input, and what its adapter costs."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import nn
from torch.nn.utils import parametrize

from mmpeft.execution.layers import is_enabled
from mmpeft.execution.linear import thin_pays
from mmpeft.execution.select import KERNEL, MATRIX, choose, stands_beside

BUILT = 'weight built'
DENSE = 'dense gradient, nothing kept'


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
    way, form = chosen or (None, None)
    positions = y.numel() // (y.shape[-1] if isinstance(layer, nn.Linear) else y.shape[1])
    dense = positions * spec.numel
    extra, name = dense, BUILT if way is None else way.name
    if way is MATRIX:
        extra, name = _of_matrix(layer, positions, form)
    elif way is KERNEL:
        extra, name = _of_kernel(layer, positions, form)
    return Explanation(path, type(layer).__name__, positions, name, 2 * dense, extra)


def _of_matrix(layer, positions, form):
    up, down = form.matrices()
    out, features, rank = len(up), down.shape[1], len(down)
    weight, ends = out * features, positions * rank * (out + features)
    if form.magnitude is not None:
        return 2 * ends + 4 * rank * weight, f'{MATRIX.name}, in the weight'
    if form.update != 'additive':
        return positions * weight + 4 * rank * weight, DENSE
    beside = stands_beside(layer, positions, (out, features))
    moved = ends if beside else 2 * rank * weight
    if not thin_pays((out, features), rank):
        return positions * weight + 2 * rank * weight + moved, DENSE
    return 2 * ends + moved, f'{MATRIX.name}, {_place(beside)}'


def _of_kernel(layer, positions, form):
    up, core, down = form.up, form.core, form.down
    shape = layer.parametrizations.weight[0].spec.shape
    out, features, *kernel = shape
    taps = prod(kernel)
    whole = core is None or down is None  # V is the kernel itself
    rank, inner = up.shape[1], features if whole else down.shape[0]
    beside = not whole and stands_beside(layer, positions, shape)
    ends = 2 * positions * (rank * out + (0 if whole else inner * features))
    middle = (2 if whole else 3) * positions * taps * rank * inner
    built = 2 * taps * rank * features * (out + (0 if whole else inner))
    moved = ends // 2 if beside else built
    return ends + middle + moved, f'{KERNEL.name}, {_place(beside)}'


def _place(beside):
    return 'beside the layer' if beside else 'in the weight'
