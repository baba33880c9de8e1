"""Whether the optimizer moves the adapters."""

from mmpeft.checkpoint.fingerprint import digests
from mmpeft.errors import listed
from mmpeft.injection.site import named_adapters

from .check import Check


class Movement(Check):
    """Finds adapters that receive gradients and stay where they started.

    For each adapter it counts the optimizer steps with a gradient in which
    some parameter group had at least a hundredth of its initial learning
    rate. So steps from which an allocator excludes the adapter do not count,
    nor does the beginning of a warm-up. After ``check_iters`` such steps the
    adapter is compared with its start.
    """

    repeats = False

    def __init__(self, monitor):
        super().__init__(monitor)
        self._adapters = named_adapters(monitor.model)
        self._steps, self._rates = dict.fromkeys(self._adapters, 0), {}
        self._start = self._values(self._adapters)

    def after_step(self) -> None:
        """Count a step of the optimizer."""
        groups = self.monitor.optimizer.param_groups if self._steps else ()
        if not any(g['lr'] > 0 and g['lr'] >= g.get('initial_lr', 0) / 100 for g in groups):
            return
        rates = {id(p): float(g['lr']) for g in groups for p in g['params']}
        for name in list(self._steps):
            parameters = list(self._adapters[name].parameters())
            gradients = [p.grad for p in parameters if p.grad is not None]
            self._steps[name] += bool(gradients)
            if self._steps[name] < self.monitor.check_iters:
                continue
            del self._steps[name]
            if any(g.any() for g in gradients):
                self._rates[name] = max(rates.get(id(p), 0.0) for p in parameters)

    def is_due(self):
        """Once an adapter had its steps; gradients, and so steps, are equal on all ranks."""
        return bool(self._rates)

    def problem(self):
        """Adapters with the learning rate 0, or that the optimizer lost."""
        rates, self._rates = self._rates, {}
        unmoved = {name: rates[name] for name in self._unmoved(rates)}
        never = [name for name, rate in unmoved.items() if not rate]
        if never:
            return (
                f'{len(never)} of {len(self._adapters)} adapters never move, such as '
                f'{listed(never)}: gradients reach them, others train, and their parameters have '
                'the learning rate 0 or are no longer those in the optimizer. Raise their rate '
                '(lr_mult in optim_wrapper.paramwise_cfg of a config), or leave them out with '
                'targets.exclude.'
            )
        if unmoved:
            self.monitor.warn(
                f'{len(unmoved)} of {len(self._adapters)} adapters are where they started after '
                f'{self.monitor.check_iters} steps, such as {listed(list(unmoved))}, at learning '
                f'rates up to {max(unmoved.values()):g}: too small a rate for their precision, or '
                'something puts them back.'
            )
        return None

    def close(self):
        """Warn about adapters that had fewer steps, as where the learning rate was always 0."""
        unmoved = self._unmoved(self._steps)
        if unmoved and not self.monitor.had_ended:
            self.monitor.warn(
                f'{len(unmoved)} of {len(self._adapters)} adapters are where they started, such '
                f'as {listed(unmoved)}. The run gave them no step, or none at a learning rate '
                'above 0.'
            )
        self._steps = {}

    def _unmoved(self, names):
        values = self._values(names)
        moved = {key.rpartition('.')[0] for key in values if values[key] != self._start[key]}
        return [name for name in names if name not in moved]

    def _values(self, names):
        parameters = {name: self._adapters[name]._parameters.items() for name in names}
        return digests({f'{name}.{k}': p for name, held in parameters.items() for k, p in held})
