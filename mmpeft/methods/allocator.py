"""Deciding during training where the parameters go."""

from collections.abc import Mapping

from .adapter import Adapter


class Allocator:
    """Acts around every optimizer step on all adapters of one method.

    :func:`mmpeft.allocate` calls it through the optimizer's own hooks, so that
    gradient accumulation, gradient scaling and any training loop are right.

    Args:
        adapters: By path in the model; each adapter once.
        steps: Optimizer steps of the whole run.

    Attributes:
        step: Steps made so far.
    """

    def __init__(self, adapters: Mapping[str, Adapter], steps: int):
        self.adapters = dict(adapters)
        self.steps = steps
        self.step = 0

    def before_step(self) -> None:
        """Gradients are there; those set to None are not stepped on."""

    def after_step(self) -> None:
        """The optimizer has stepped; :attr:`step` counts this step already."""

    def state_dict(self) -> dict:
        """Plain data and tensors that a resumed run goes on from."""
        return dict(step=self.step)

    def load_state_dict(self, state: Mapping) -> None:
        """The reverse of :meth:`state_dict`."""
        self.step = state['step']

    def close(self) -> None:
        """Take off what was put on the adapters."""
