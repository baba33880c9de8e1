"""Freezing: no gradients, and BatchNorm statistics that stay where they were."""

from torch import nn

STATISTICS = nn.modules.batchnorm._NormBase


class _FrozenStatistics:
    """A normalisation layer that is in evaluation mode, and remembers what it was told."""

    def train(self, mode=True):
        self.peft_mode = mode
        return super().train(False)


def freeze_statistics(module: nn.Module) -> None:
    """Hold the running statistics of all normalisation layers below a module.

    The layers change their class, as a parametrized layer does, so that the
    effect survives ``model.train()`` and ``copy.deepcopy``.
    """
    for layer in module.modules():
        if isinstance(layer, STATISTICS) and not isinstance(layer, _FrozenStatistics):
            kind = type(layer)
            layer.__class__ = type(kind.__name__, (_FrozenStatistics, kind), {})
            layer.train(layer.training)


def unfreeze_statistics(module: nn.Module) -> None:
    """Undo :func:`freeze_statistics`."""
    for layer in module.modules():
        if isinstance(layer, _FrozenStatistics):
            layer.__class__ = type(layer).__bases__[1]
            layer.train(layer.__dict__.pop('peft_mode'))
