"""Layers that compute the same function faster.

A layer changes its class, as a parametrized one does, so that copies and
checkpoints keep working; ``layer.weight`` remains phi(W) to whoever reads it.
"""

from torch import nn
from torch.nn.utils import parametrize

from mmpeft.methods.spec import ConvGeometry
from mmpeft.quantization import Quantized

from .checkpointing import run_again
from .classes import Fast, change_class, forward_owner, is_changed, restore_class
from .frozen import kind_for
from .select import AUTO, PLAIN, Kernel, has_one_adapter, select_kernel, settings_of


class Adapted(Fast):
    """A layer whose forward runs the kernel selected for its input."""

    execution = AUTO
    geometry = settings = None

    def forward(self, input):
        kernel = select_kernel(self, input) or Kernel('torch', super().forward, keeps_weight=True)
        if kernel.keeps_weight and _is_in_few_bits(self):
            return run_again(kernel.run, input)
        return kernel.run(input)


class Rebuilt(Fast):
    """A layer that no kernel fits, whose weight is stored in a fraction of the memory of W'."""

    def forward(self, *args, **kwargs):
        return run_again(super().forward, *args, **kwargs)


def enable(layer: nn.Module, execution: str = AUTO) -> None:
    """Let a layer with one adapter on its weight select a kernel in each forward.

    Of other layers W' is not kept where W is in few bits; they are left unchanged where it is not.
    ``execution`` is one of :data:`mmpeft.execution.CHOICES`.
    """
    if execution == PLAIN or is_changed(layer) or not parametrize.is_parametrized(layer, 'weight'):
        return
    if _is_torchs(type(layer)) and has_one_adapter(layer):
        geometry = settings = None
        if not isinstance(layer, nn.Linear):
            settings = tuple(tuple(s) if isinstance(s, list) else s for s in settings_of(layer))
            geometry = ConvGeometry.of(layer, layer.parametrizations.weight[0].spec)
        attributes = dict(execution=execution, geometry=geometry, settings=settings)
        change_class(layer, Adapted, **attributes)
    elif _is_in_few_bits(layer):
        change_class(layer, Rebuilt, execution=execution)


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


def _is_torchs(kind):
    """Whether a class computes what torch's linear layer or convolution does."""
    owner = forward_owner(kind)
    return owner is nn.Linear or (
        owner in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and kind._conv_forward is owner._conv_forward
    )


def _is_in_few_bits(layer):
    chain = layer.parametrizations.weight
    return isinstance(getattr(chain, 'original', None), Quantized)
