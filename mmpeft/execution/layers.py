"""Layers that compute the same faster.

A layer changes its class, as a parametrized one does, so that copies and
checkpoints keep working; ``layer.weight`` remains phi(W) to whoever reads it.
"""

from torch import nn
from torch.nn.utils import parametrize

from .frozen import kind_for
from .kernels import AUTO, PLAIN
from .select import has_one_adapter, select_kernel


class _Fast:
    """Marks the classes that layers are given here."""


class _Adapted:
    """A layer whose forward runs the fastest kernel that computes the same."""

    execution = AUTO

    def forward(self, x):
        kernel = select_kernel(self, x)
        return super().forward(x) if kernel is None else kernel(x)


def enable(layer: nn.Module, execution: str = AUTO) -> None:
    """Let a layer with one adapter on its weight select a kernel in each forward.

    Args:
        layer: Others are left unchanged.
        execution: One of :data:`mmpeft.execution.CHOICES`.
    """
    if execution != PLAIN and _is_eligible(layer):
        _change_class(layer, _Adapted, execution=execution)


def enable_frozen(root: nn.Module) -> None:
    """Let frozen layers without adapters compute faster, or have less saved for backward."""
    for layer in root.modules():
        if not isinstance(layer, _Fast) and not parametrize.is_parametrized(layer):
            kind = kind_for(layer)
            if kind is not None:
                _change_class(layer, kind)


def disable(layer: nn.Module) -> None:
    """Undo the two above: the layer computes as its own class does."""
    if isinstance(layer, _Fast):
        layer.__class__ = type(layer).__bases__[2]


def is_enabled(layer: nn.Module) -> bool:
    """Whether a layer with an adapter selects kernels."""
    return isinstance(layer, _Adapted)


def execution_of(layer: nn.Module) -> str:
    """How a layer with an adapter was enabled."""
    return getattr(layer, 'execution', PLAIN)


def _change_class(layer, mixin, **attributes):
    kind = type(layer)
    content = dict(__module__=kind.__module__, __qualname__=kind.__qualname__) | attributes
    layer.__class__ = type(kind.__name__, (_Fast, mixin, kind), content)


def _is_eligible(layer):
    if isinstance(layer, _Fast) or not parametrize.is_parametrized(layer, 'weight'):
        return False
    known = {nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward}
    return type(layer).forward in known and has_one_adapter(layer)
