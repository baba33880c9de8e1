"""Whether the methods' terms of the loss are part of it."""

import torch

from mmpeft.injection.site import named_adapters

from .check import Check


class Penalty(Check):
    """Warns where methods have a term of the loss that no backward pass went through."""

    repeats = False

    def __init__(self, monitor):
        super().__init__(monitor)
        with torch.no_grad():
            adapters = named_adapters(monitor.model).values()
            self._adapters = [a for a in adapters if a.penalty() is not None]
        for adapter in self._adapters:
            adapter.penalized = False

    def is_in_loss(self) -> bool:
        """Whether the backward pass of this step went through a term."""
        return any(adapter.penalized for adapter in self._adapters)

    def after_step(self) -> None:
        """Look at each step anew where the monitor adds what the loss lacks."""
        if self.monitor.add_penalty:
            for adapter in self._adapters:
                adapter.penalized = False

    def problem(self):
        missed = [adapter for adapter in self._adapters if not adapter.penalized]
        if missed and not self.monitor.add_penalty:
            names = sorted({type(adapter.method).__name__ for adapter in missed})
            self.monitor.warn(
                f'{" and ".join(names)} has a term of the loss, and none of '
                f'{self.monitor.iterations} iterations went backward through it. Add '
                'mmpeft.penalty(model) to the loss, give mmpeft.monitor(..., add_penalty=True), '
                'or set the weight of the term to 0.'
            )
        return None

    def close(self):
        if 0 < self.monitor.iterations < self.monitor.check_iters:
            self.problem()
