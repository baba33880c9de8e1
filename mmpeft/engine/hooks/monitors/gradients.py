"""Whether gradients reach the adapters."""

from torch import nn

from mmpeft.methods import Adapter


class GradientWatch:
    """Notes which adapters of a model receive a gradient.

    Gradients are seen while they are computed, since an optimizer step leaves
    none behind. Each parameter's hook goes as soon as it has seen one that is
    not zero.

    Args:
        model: With adapters.
    """

    def __init__(self, model: nn.Module):
        self.reached = {}
        self._handles = []
        for name, adapter in model.named_modules():
            if isinstance(adapter, Adapter):
                self.reached[name] = None
                for parameter in adapter.parameters():
                    self._handles.append(parameter.register_hook(self._note(name)))

    def _note(self, name):
        def hook(gradient):
            if not self.reached[name]:
                self.reached[name] = bool(gradient.any())

        return hook

    @property
    def unreached(self) -> list[str]:
        """Adapters whose gradient was never computed."""
        return [name for name, seen in self.reached.items() if seen is None]

    @property
    def always_zero(self) -> list[str]:
        """Adapters whose gradients were all zero."""
        return [name for name, seen in self.reached.items() if seen is False]

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
