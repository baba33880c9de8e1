"""Running statistics of frozen norms, which stay as they are in training too."""

import warnings
from collections.abc import Iterator

from torch import nn

from mmpeft.execution.classes import change_class, restore_class

from .weights import is_below, layers, newly_initialized

STATISTICS = nn.modules.batchnorm._NormBase


class FrozenStatistics:
    """A norm layer in evaluation mode; ``peft_mode`` is the mode that was asked for."""

    def train(self, mode=True):
        self.peft_mode = mode
        return super().train(False)

    def reset_running_stats(self):
        """Keep the statistics, with a warning: in evaluation mode nothing would fill them again."""
        warnings.warn(
            'The statistics of frozen norms stay as they are: reset_running_stats, which '
            'torch.optim.swa_utils.update_bn calls, does nothing here.',
            stacklevel=2,
        )


def norms_to_freeze(module: nn.Module) -> Iterator[nn.Module]:
    """The norm layers in a module with running statistics that are not newly initialized."""
    new = newly_initialized(module)
    for path, layer in layers(module):
        if isinstance(layer, STATISTICS) and not is_below(path, new):
            yield layer


def freeze_statistics(module: nn.Module) -> None:
    """Hold the running statistics of :func:`norms_to_freeze`.

    The layers change their class, so that ``model.train()`` and ``copy.deepcopy`` keep the effect.
    """
    for layer in norms_to_freeze(module):
        if not isinstance(layer, FrozenStatistics):
            change_class(layer, FrozenStatistics)
            layer.train(layer.training)


def release_statistics(module: nn.Module) -> None:
    """Undo :func:`freeze_statistics`."""
    for layer in module.modules():
        if isinstance(layer, FrozenStatistics):
            restore_class(layer, FrozenStatistics)
            layer.train(layer.__dict__.pop('peft_mode'))
