"""Layers that compute the same function faster.

A layer changes its class, as a parametrized one does, so that copies and
checkpoints keep working; ``layer.weight`` remains phi(W) to whoever reads it.
"""

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from mmpeft.methods.spec import ConvGeometry
from mmpeft.quantization import Quantized
from mmpeft.transforms import is_transformed

from .classes import Fast, change_class, is_changed, restore_class
from .frozen import kind_for
from .select import AUTO, PLAIN, has_one_adapter, select_kernel


class Adapted(Fast):
    """A layer whose forward runs the kernel selected for its input."""

    execution = AUTO
    geometry = None

    def forward(self, x):
        kernel = select_kernel(self, x)
        if kernel is not None:
            return kernel.run(x)
        original = self.parametrizations.weight.original
        if isinstance(original, Quantized) and torch.is_grad_enabled() and not is_transformed():
            # W' would be kept for backward, in many times the memory of the weight.
            return checkpoint(super().forward, x, use_reentrant=False)
        return super().forward(x)


def enable(layer: nn.Module, execution: str = AUTO) -> None:
    """Let a layer with one adapter on its weight select a kernel in each forward.

    Other layers are left unchanged. ``execution`` is one of :data:`mmpeft.execution.CHOICES`.
    """
    known = nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward
    if execution == PLAIN or is_changed(layer) or type(layer).forward not in known:
        return
    if parametrize.is_parametrized(layer, 'weight') and has_one_adapter(layer):
        spec, geometry = layer.parametrizations.weight[0].spec, None
        if not isinstance(layer, nn.Linear):
            geometry = ConvGeometry.of(layer, spec)
        change_class(layer, Adapted, execution=execution, geometry=geometry)


def enable_frozen(root: nn.Module) -> None:
    """Let frozen layers without adapters compute faster, or have less saved for backward."""
    for layer in root.modules():
        if not isinstance(layer, Fast) and not parametrize.is_parametrized(layer):
            kind = kind_for(layer)
            if kind is not None:
                change_class(layer, kind)


def disable(layer: nn.Module) -> None:
    """Undo :func:`enable` or :func:`enable_frozen`."""
    restore_class(layer, Fast)


def is_enabled(layer: nn.Module) -> bool:
    """Whether a layer with an adapter selects kernels."""
    return isinstance(layer, Adapted)


def execution_of(layer: nn.Module) -> str:
    """How a layer with an adapter was enabled."""
    return getattr(layer, 'execution', PLAIN)
