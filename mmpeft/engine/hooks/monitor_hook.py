"""The monitor of :mod:`mmpeft.training` at the moments of a Runner."""

import math

import torch
from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import Runner, find_latest_checkpoint

from mmpeft.errors import TrainingError
from mmpeft.training.monitor import Monitor


class RunnerMonitor(Monitor):
    """A monitor whose iterations are those of a Runner, which logs, and which names files."""

    def __init__(self, runner: Runner, **options):
        # The last step takes what is left when iterations do not divide.
        steps = math.ceil(runner.max_iters / runner.optim_wrapper._accumulative_counts)
        self.runner, self._before = runner, runner.iter
        self.had_ended = 0 < runner.max_iters <= runner.iter
        super().__init__(runner.model, runner.optim_wrapper, steps, **options)

    def after_step(self):
        for check in self.checks:
            check.after_step()

    def _watch_loss(self):
        return []  # a Runner hands the losses over

    def warn(self, text):
        self.runner.logger.warning(text)

    def last_checkpoint(self):
        path = find_latest_checkpoint(self.runner.work_dir)
        return f'The last checkpoint is {path}.' if path else 'There is no checkpoint yet.'


class MonitorHook(Hook):
    """Calls a :class:`RunnerMonitor`, before :class:`CheckpointHook` removes older checkpoints.

    Args:
        options: Arguments of :func:`mmpeft.monitor`.

    Attributes:
        monitor: From the start of training.
    """

    priority = 'LOW'

    def __init__(self, **options):
        self.options = options
        self.monitor = self._allocated = None

    @property
    def allocation(self):
        """The allocators, from the start of training."""
        return self.monitor and self.monitor.allocation

    def before_train(self, runner):
        self.monitor = RunnerMonitor(runner, **self.options)
        if runner._resume and self._allocated is not None:
            self.allocation.load_state_dict(self._allocated)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        losses = {k: torch.as_tensor(v) for k, v in (outputs or {}).items() if 'loss' in k}
        self.monitor.finite.note({k: float(v.detach()) for k, v in losses.items()})
        scaler = getattr(runner.optim_wrapper, 'loss_scaler', None)
        scaled = scaler is not None and scaler.is_enabled()
        self.monitor.advance(runner.optim_wrapper.should_update(), scaled, _saves(runner))

    def after_train_epoch(self, runner):
        """Check; a loop over iterations counts as one epoch."""
        self.monitor.check()

    def after_train(self, runner):
        self.monitor.close(look=False)  # done after the last epoch

    def before_save_checkpoint(self, runner, checkpoint):
        """Check what is saved, averaged weights included; store the state of the allocators."""
        if self.monitor is not None:
            states = (checkpoint.get(part, {}) for part in ('state_dict', 'ema_state_dict'))
            problem = self.monitor.finite.refusal(*states)
            if problem:  # on this rank alone, which may be the only one that saves
                raise TrainingError(problem)
            if 'optimizer' in checkpoint:
                checkpoint['mmpeft_allocation'] = self.allocation.state_dict()

    def after_load_checkpoint(self, runner, checkpoint):
        self._allocated = checkpoint.get('mmpeft_allocation')


def _saves(runner):
    return any(
        hook.every_n_train_iters(runner, hook.interval, hook.save_begin)
        or (hook.save_last and hook.is_last_train_iter(runner))
        for hook in runner.hooks
        if isinstance(hook, CheckpointHook) and not hook.by_epoch
    )
