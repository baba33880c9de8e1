"""Whether the optimizer moves the adapters."""

import torch
from mmengine.hooks import Hook
from torch.optim import Optimizer

from mmpeft.checkpoint.fingerprint import digests
from mmpeft.errors import UsageError
from mmpeft.injection.site import named_adapters

from .monitor import bare, some


class MotionWatch(Hook):
    """Finds adapters that receive gradients and stay where they started.

    Of each adapter it counts the optimizer steps for which it had a gradient
    while some parameter group trained at a hundredth of its initial learning
    rate or more. So steps from which an allocator keeps it do not count, nor
    does the beginning of a warm-up. After ``check_iters`` of them it compares
    the adapter with its start.

    Args:
        optimizer: That is to move them.
        check_iters: Steps that each adapter is given.
    """

    def __init__(self, optimizer: Optimizer, check_iters: int):
        self.check_iters = check_iters
        self.steps, self._due = {}, {}
        optimizer.register_step_post_hook(self._after_step)

    def before_train(self, runner):
        """Take down where the adapters start."""
        self._adapters = named_adapters(bare(runner.model))
        self.steps = dict.fromkeys(self._adapters, 0)
        self._start = self._values(self._adapters)

    @torch.compiler.disable
    def _after_step(self, optimizer, *_):
        if not self.steps:
            return
        groups = optimizer.param_groups
        if not any(g['lr'] > 0 and g['lr'] >= g.get('initial_lr', 0) / 100 for g in groups):
            return
        rates = {id(p): float(g['lr']) for g in groups for p in g['params']}
        for name in list(self.steps):
            parameters = list(self._adapters[name].parameters())
            gradients = [p.grad for p in parameters if p.grad is not None]
            self.steps[name] += bool(gradients)
            if self.steps[name] < self.check_iters:
                continue
            del self.steps[name]
            if any(g.any() for g in gradients):
                self._due[name] = max(rates.get(id(p), 0.0) for p in parameters)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        """Tell of adapters that do not move.

        Raises:
            UsageError: Their learning rate is 0, or the optimizer lost them.
        """
        rates, self._due = self._due, {}
        unmoved = {name: rates[name] for name in self._resting(rates)} if rates else {}
        still = [name for name, rate in unmoved.items() if not rate]
        if still:
            raise UsageError(
                f'{len(still)} of {len(self._adapters)} adapters never move, such as '
                f'{some(still)}: gradients reach them, others train, and their parameters have '
                'the learning rate 0 or are no longer those in the optimizer. Raise their lr_mult '
                'in optim_wrapper.paramwise_cfg, or leave them out with targets.exclude.'
            )
        if unmoved:
            runner.logger.warning(
                f'{len(unmoved)} of {len(self._adapters)} adapters are where they started after '
                f'{self.check_iters} steps, such as {some(list(unmoved))}, at learning rates up '
                f'to {max(unmoved.values()):g}: too small a rate for their precision, or something '
                'puts them back.'
            )

    def after_train(self, runner):
        """Tell of those that had fewer steps, as where the learning rate was 0 all along."""
        unmoved = self._resting(self.steps)
        if unmoved:
            runner.logger.warning(
                f'{len(unmoved)} of {len(self._adapters)} adapters are where they started, such '
                f'as {some(unmoved)}. The run gave them no step, or none at a learning rate above '
                '0.'
            )
        self.steps = {}

    def _resting(self, names):
        values = self._values(names)
        moved = {key.rpartition('.')[0] for key in values if values[key] != self._start[key]}
        return [name for name in names if name not in moved]

    def _values(self, names):
        return digests(
            {
                f'{name}.{k}': p
                for name in names
                for k, p in self._adapters[name]._parameters.items()
            }
        )
