"""Allocators of methods, such as AdaLoRA's of ranks, in a Runner."""

from mmengine.hooks import Hook

from mmpeft.engine.hooks.unwrap import unwrap
from mmpeft.training.allocation import allocate


class AllocationHook(Hook):
    """Runs the allocators of a model's methods around each step, and keeps their state."""

    def __init__(self):
        self.allocation = None
        self._resumed = None

    def after_load_checkpoint(self, runner, checkpoint):
        self._resumed = checkpoint.get('mmpeft_allocation')

    def before_train(self, runner):
        """Start the allocators; continue with their state in a resumed run."""
        steps = runner.max_iters // runner.optim_wrapper._accumulative_counts
        optimizer = runner.optim_wrapper.optimizer
        self.allocation = allocate(unwrap(runner.model), optimizer, steps)
        if runner._resume and self._resumed is not None:
            self.allocation.load_state_dict(self._resumed)

    def after_train(self, runner):
        self.allocation.close()

    def before_save_checkpoint(self, runner, checkpoint):
        if 'optimizer' in checkpoint and self.allocation is not None:
            checkpoint['mmpeft_allocation'] = self.allocation.state_dict()
