"""Whether gradients reach the adapters."""

from mmengine.model import is_model_wrapper

from mmpeft.engine.hooks.unwrap import unwrap
from mmpeft.injection.site import named_adapters

from .monitor import Monitor, listed


class GradientMonitor(Monitor):
    """Finds adapters that receive no gradient in the first iterations.

    Gradients are seen while they are computed, because an optimizer step
    leaves none. Under DDP, which fails on unused parameters, the check comes
    after one iteration.

    Attributes:
        reached: For each adapter None while it had no gradient, then whether
            one was not zero.
    """

    def before_train(self, runner):
        adapters = named_adapters(unwrap(runner.model))
        self.reached = dict.fromkeys(adapters)
        self._handles = [
            parameter.register_hook(self._note(name))
            for name, adapter in adapters.items()
            for parameter in adapter.parameters()
        ]

    def _note(self, name):
        def hook(gradient):
            if not self.reached[name]:
                self.reached[name] = bool(gradient.any())

        return hook

    def is_due(self, runner):
        """After ``check_iters`` iterations, and under DDP after the first."""
        unused_fail = not runner.cfg.get('find_unused_parameters')
        early = is_model_wrapper(runner.model) and unused_fail
        return self.iterations in ((1, self.check_iters) if early else (self.check_iters,))

    def after_train_epoch(self, runner):
        """Not yet: short runs are checked at their end."""

    def after_train(self, runner):
        if self.iterations < self.check_iters:
            self.stop_if_wrong(runner)
            self._close(runner)

    def check(self, runner):
        """Adapters without a gradient."""
        unreached = [name for name, seen in self.reached.items() if seen is None]
        if not unreached:
            if self.iterations >= self.check_iters:
                self._close(runner)
            return None
        return (
            f'No gradient reached {len(unreached)} of {len(self.reached)} adapters in '
            f'{self.iterations} iterations, such as {listed(unreached)}. Their layers are not used '
            'in the forward pass, or run under no_grad (a frozen_stages of the backbone, say) or '
            'in a reentrant checkpoint. Leave them out with targets.exclude, or let the gradient '
            'through.'
        )

    def _close(self, runner):
        zero = [name for name, seen in self.reached.items() if seen is False]
        if zero:
            runner.logger.warning(
                f'The gradients of {len(zero)} adapters were all zero in {self.iterations} '
                f'iterations, such as {listed(zero)}.'
            )
        for handle in self._handles:
            handle.remove()
