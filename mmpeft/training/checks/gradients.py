"""Whether gradients reach the adapters."""

from mmengine.dist import all_gather_object
from torch.nn.parallel import DistributedDataParallel

from mmpeft.errors import listed
from mmpeft.injection.site import named_adapters
from mmpeft.injection.wrappers import local_part

from .check import Check


class Gradients(Check):
    """Finds adapters that receive no gradient in the first iterations.

    Gradients are seen while they are computed, because an optimizer step
    leaves none. Under DDP, which fails on unused parameters, the check comes
    after one iteration. Sharded parameters have theirs when the optimizer
    steps, each rank a part of it.

    Attributes:
        reached: For each adapter None while it had no gradient, then whether
            one was not zero.
    """

    repeats = False

    def __init__(self, monitor):
        super().__init__(monitor)
        adapters = named_adapters(monitor.model)
        self.reached = dict.fromkeys(adapters)
        self._watched = adapters if monitor.sharded else {}
        self._early = any(
            isinstance(m, DistributedDataParallel) and not m.find_unused_parameters
            for m in monitor.wrapped.modules()
        )
        self._handles = [
            parameter.register_hook(self._note(name))
            for name, adapter in adapters.items()
            if not monitor.sharded
            for parameter in adapter.parameters()
            if parameter.requires_grad
        ]

    def _note(self, name):
        def hook(gradient):
            if not self.reached[name]:
                self.reached[name] = bool(gradient.any())

        return hook

    def before_step(self) -> None:
        """Look at the gradients of sharded parameters."""
        for name, adapter in self._watched.items():
            for parameter in adapter.parameters():
                if parameter.grad is not None:
                    self._note(name)(local_part(parameter.grad))

    def is_due(self):
        return super().is_due() or (self._early and self.monitor.iterations == 1)

    def close(self):
        if 0 < self.monitor.iterations < self.monitor.check_iters:  # a short run
            self.monitor.stop_if(self.problem())
            self._finish()
        if not self.monitor.iterations and any(self.reached.values()):
            self.monitor.warn(
                'Gradients reached the adapters, and optimizer.step() of the optimizer that the '
                'monitor was given was never called: nothing was watched.'
            )
        self._remove()

    def problem(self):
        """Adapters without a gradient."""
        if self._watched:
            for other in all_gather_object(self.reached):
                for name, seen in other.items():
                    self.reached[name] = seen if not self.reached[name] else True
        unreached = [name for name, seen in self.reached.items() if seen is None]
        if not unreached:
            if super().is_due():
                self._finish()
            return None
        return (
            f'No gradient reached {len(unreached)} of {len(self.reached)} adapters in '
            f'{self.monitor.iterations} iterations, such as {listed(unreached)}. Their layers are '
            'not used in the forward pass, or run under no_grad (a frozen_stages of the backbone, '
            'say). Leave them out with targets.exclude, or let the gradient through.'
        )

    def _finish(self):
        zero = [name for name, seen in self.reached.items() if seen is False]
        if zero:
            self.monitor.warn(
                f'The gradients of {len(zero)} adapters were all zero in '
                f'{self.monitor.iterations} iterations, such as {listed(zero)}.'
            )
        self._remove()

    def _remove(self):
        self._watched = {}
        while self._handles:
            self._handles.pop().remove()
