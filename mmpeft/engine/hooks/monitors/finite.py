"""Whether losses, gradients and weights are finite."""

from math import isfinite

import torch
from mmengine.optim import OptimWrapper

from mmpeft.checkpoint.keys import adapter_state_dict
from mmpeft.engine.hooks.unwrap import unwrap
from mmpeft.errors import TrainingError, UsageError

from .monitor import Monitor, last_checkpoint, listed
from .origin import Origin

SCALER_PATIENCE = 10
"""Steps skipped by a gradient scaler that count as one that is not finite by itself."""


class FiniteMonitor(Monitor):
    """Skips steps whose gradients are not finite, and stops a run of such steps.

    A skipped step changes no weight, optimizer state or allocator. After
    ``nonfinite_iters`` of them in a row the run stops. In the last one all
    layers are checked, so that the error says where it begins. A step that a
    gradient scaler skips at a finite loss is how it finds its scale, and
    counts a tenth. Weights that are not finite are saved in no checkpoint;
    buffers that are so from the start, such as masks, may be.

    Args:
        optim_wrapper: Whose steps are guarded.
        nonfinite_iters: Steps in a row that stop the run; at least 1.
        check_iters: See :class:`Monitor`.
    """

    def __init__(self, optim_wrapper: OptimWrapper, nonfinite_iters: int, check_iters: int):
        super().__init__(check_iters)
        if nonfinite_iters < 1:
            raise UsageError(f'nonfinite_iters={nonfinite_iters} must be a number of steps >= 1.')
        self.limit = nonfinite_iters
        self.row = 0
        self.origin = None
        self._losses, self._skipped, self._stepped = {}, False, False
        optim_wrapper.optimizer.register_step_pre_hook(self._guard)

    @torch.compiler.disable
    def _guard(self, optimizer, *_):
        parameters = [p for group in optimizer.param_groups for p in group['params']]
        gradients = [p.grad for p in parameters if p.grad is not None]
        self._stepped = True
        if gradients and not _norms(gradients).isfinite().all():
            self._skipped = True
            for parameter in parameters:
                parameter.grad = None

    def before_train(self, runner):
        self._check_layers(runner)
        self._from_start = set(_nonfinite(dict(unwrap(runner.model).named_buffers())))

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        """Count, once the step that this iteration is part of is done."""
        losses = {k: float(v) for k, v in (outputs or {}).items() if 'loss' in k}
        self._losses |= {k: v for k, v in losses.items() if not isfinite(v)}
        if runner.optim_wrapper.should_update():
            self._count(runner)
        super().after_train_iter(runner, batch_idx, data_batch, outputs)

    def _count(self, runner):
        scaler = getattr(runner.optim_wrapper, 'loss_scaler', None)
        scaled = scaler is not None and scaler.is_enabled()
        skipped = self._skipped or (scaled and not self._stepped)
        if not skipped and not self._losses:
            self.row = 0
        elif scaled and not self._losses:
            self.row += 1
        else:
            self.row += SCALER_PATIENCE
            runner.logger.warning(f'Iteration {runner.iter + 1}: {self._account(skipped)}.')
        if self.row >= SCALER_PATIENCE * self.limit:
            raise TrainingError(self._report(runner, skipped))
        self._losses, self._skipped, self._stepped = {}, False, False
        self._check_layers(runner)

    def _check_layers(self, runner):
        near = self.row >= SCALER_PATIENCE * (self.limit - 1)
        if near and self.origin is None:
            self.origin = Origin(unwrap(runner.model))
        elif near:
            self.origin.reset()
        elif self.origin is not None:
            self.origin.close()
            self.origin = None

    def _account(self, skipped):
        losses = ', '.join(f'{name} is {value}' for name, value in self._losses.items())
        losses = losses or 'the loss is finite'
        if not skipped:
            return f'{losses}, the gradients are finite'
        return f'{losses}, gradients are NaN or infinite, and the step was skipped'

    def _report(self, runner, skipped):
        weights = self._nonfinite(adapter_state_dict(unwrap(runner.model)))
        held = f'Weights that are not finite: {listed(weights)}. ' if weights else ''
        return (
            'Loss or gradients were NaN or infinite in too many steps in a row (nonfinite_iters='
            f'{self.limit}), up to iteration {runner.iter + 1}: {self._account(skipped)}. '
            f'{self.origin} {held}{last_checkpoint(runner)} Check the data of these iterations, '
            'lower the learning rate, clip gradients (optim_wrapper.clip_grad), or use bfloat16 '
            'instead of float16.'
        )

    def check(self, runner):
        """Weights that are not finite, before they replace a checkpoint."""
        return _refusal(runner, self._nonfinite(adapter_state_dict(unwrap(runner.model))))

    def before_save_checkpoint(self, runner, checkpoint):
        """The same for everything that is about to be saved, averaged weights included."""
        states = (checkpoint.get(part, {}) for part in ('state_dict', 'ema_state_dict'))
        problem = _refusal(runner, [name for state in states for name in self._nonfinite(state)])
        if problem:
            raise TrainingError(problem)

    def _nonfinite(self, state):
        return [k for k in _nonfinite(state) if k.removeprefix('module.') not in self._from_start]


def _nonfinite(state):
    return [k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all()]


def _refusal(runner, names):
    if not names:
        return None
    return (
        f'{len(names)} tensors of the model are NaN or infinite, such as {listed(names)}. They are '
        f'not saved. {last_checkpoint(runner)}'
    )


def _norms(gradients):
    norms = torch._foreach_norm(gradients)
    return torch.stack([norm.to(norms[0].device, torch.float32) for norm in norms])
