"""Layers that compute the same faster.

A layer changes its class, as a parametrized one does, so that copies and
checkpoints keep working; ``layer.weight`` remains phi(W) to whoever reads it.
"""

from torch import nn
from torch.nn.utils import parametrize

from .frozen import kind_for
from .select import AUTO, PLAIN, choose, has_one_adapter


class _Exchanged:
    """Marks the classes that layers were given here."""


class _Executed:
    """A layer whose forward takes the fastest way that computes the same."""

    execution = AUTO

    def forward(self, x):
        chosen = choose(self, x)
        if chosen is None:
            return super().forward(x)
        way, thin = chosen
        return way.run(self, x, thin)


def enable(layer: nn.Module, execution: str = AUTO) -> None:
    """Let a layer with one adapter on its weight choose its way in each forward.

    Args:
        layer: Others are left alone.
        execution: One of :data:`mmpeft.execution.CHOICES`.
    """
    if execution != PLAIN and _is_eligible(layer):
        _exchange(layer, _Executed, execution=execution)


def enable_frozen(root: nn.Module) -> None:
    """Let frozen layers without adapters compute faster, or have less kept for backward."""
    for layer in root.modules():
        if not isinstance(layer, _Exchanged) and not parametrize.is_parametrized(layer):
            kind = kind_for(layer)
            if kind is not None:
                _exchange(layer, kind)


def disable(layer: nn.Module) -> None:
    """Undo the two above: the layer computes as its own class does."""
    if isinstance(layer, _Exchanged):
        layer.__class__ = type(layer).__bases__[2]


def is_enabled(layer: nn.Module) -> bool:
    """Whether a layer with an adapter chooses its way."""
    return isinstance(layer, _Executed)


def execution_of(layer: nn.Module) -> str:
    """How a layer with an adapter was enabled."""
    return getattr(layer, 'execution', PLAIN)


def _exchange(layer, mixin, **attributes):
    kind = type(layer)
    content = dict(__module__=kind.__module__, __qualname__=kind.__qualname__) | attributes
    layer.__class__ = type(kind.__name__, (_Exchanged, mixin, kind), content)


def _is_eligible(layer):
    if isinstance(layer, _Exchanged) or not parametrize.is_parametrized(layer, 'weight'):
        return False
    known = {nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward}
    return type(layer).forward in known and has_one_adapter(layer)
