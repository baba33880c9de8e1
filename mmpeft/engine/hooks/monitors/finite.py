"""Whether losses, gradients and weights are finite."""

from collections.abc import Mapping
from math import isfinite

import torch
from torch import Tensor

from mmpeft.checkpoint.keys import adapter_state_dict
from mmpeft.errors import UsageError

from .monitor import Watch, bare, last_checkpoint, some
from .origin import Origin

SCALER_PATIENCE = 10
"""Steps skipped by a gradient scaler that weigh as much as one that is not finite by itself."""


class FiniteWatch(Watch):
    """Leaves out steps whose gradients are not finite, and stops a run of them.

    A left out step changes no weight, no optimizer state and no allocator.
    After ``nonfinite_iters`` of them in a row the run stops. In the last, all
    layers are watched, so that the error says where it begins. A step that a
    gradient scaler skips at a finite loss is how it finds its scale; such a
    step counts a tenth. Weights that are not finite are saved in no
    checkpoint; buffers that are so from the start, such as masks, may be.

    Args:
        optim_wrapper (OptimWrapper): Whose steps are guarded.
        nonfinite_iters: Steps in a row that stop the run.
        check_iters: See :class:`Watch`.
    """

    def __init__(self, optim_wrapper, nonfinite_iters: int, check_iters: int):
        super().__init__(check_iters)
        if nonfinite_iters < 1:
            raise UsageError(
                f'nonfinite_iters={nonfinite_iters} must be a number of steps from 1 on.'
            )
        self.limit = nonfinite_iters
        self.row = 0
        self.origin = None
        self._losses, self._left_out, self._stepped = {}, False, False
        optim_wrapper.optimizer.register_step_pre_hook(self._guard)

    @torch.compiler.disable
    def _guard(self, optimizer, *_):
        parameters = [p for group in optimizer.param_groups for p in group['params']]
        gradients = [p.grad for p in parameters if p.grad is not None]
        self._stepped = True
        if gradients and not _norms(gradients).isfinite().all():
            self._left_out = True
            for parameter in parameters:
                parameter.grad = None

    def before_train(self, runner):
        """Watch the layers from the start if one such step is to stop the run."""
        self._watch_layers(runner)
        model = bare(runner.model)
        self._by_design = set(nonfinite(dict(model.named_buffers())))

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        """Count, once the step that this iteration is part of is done.

        Raises:
            UsageError: There were too many in a row.
        """
        losses = {k: float(v) for k, v in (outputs or {}).items() if 'loss' in k}
        self._losses |= {k: v for k, v in losses.items() if not isfinite(v)}
        if runner.optim_wrapper.should_update():
            self._count(runner)
        super().after_train_iter(runner, batch_idx, data_batch, outputs)

    def _count(self, runner):
        scaler = getattr(runner.optim_wrapper, 'loss_scaler', None)
        scaled = scaler is not None and scaler.is_enabled()
        left_out = self._left_out or (scaled and not self._stepped)
        if not left_out and not self._losses:
            self.row = 0
        elif scaled and not self._losses:
            self.row += 1
        else:
            self.row += SCALER_PATIENCE
            runner.logger.warning(f'Iteration {runner.iter + 1}: {self._account(left_out)}.')
        if self.row >= SCALER_PATIENCE * self.limit:
            raise UsageError(self._report(runner, left_out))
        self._losses, self._left_out, self._stepped = {}, False, False
        self._watch_layers(runner)

    def _watch_layers(self, runner):
        near = self.row >= SCALER_PATIENCE * (self.limit - 1)
        if near and self.origin is None:
            self.origin = Origin(bare(runner.model))
        elif near:
            self.origin.forget()
        elif self.origin is not None:
            self.origin.close()
            self.origin = None

    def _account(self, left_out):
        losses = ', '.join(f'{name} is {value}' for name, value in self._losses.items())
        losses = losses or 'the loss is finite'
        if not left_out:
            return f'{losses}, the gradients are finite'
        return f'{losses}, gradients are NaN or infinite, and the step was left out'

    def _report(self, runner, left_out):
        weights = self._lost(adapter_state_dict(bare(runner.model)))
        held = f'Weights that are not finite: {some(weights)}. ' if weights else ''
        return (
            'Loss or gradients were NaN or infinite in too many steps in a row (nonfinite_iters='
            f'{self.limit}), up to iteration {runner.iter + 1}: {self._account(left_out)}. '
            f'{self.origin} {held}{last_checkpoint(runner)} Look at the data of these iterations, '
            'lower the learning rate, clip gradients (optim_wrapper.clip_grad), or leave float16 '
            'for bfloat16.'
        )

    def look(self, runner):
        """Weights that are not finite, before they take the place of a checkpoint."""
        return self._refusal(runner, self._lost(adapter_state_dict(bare(runner.model))))

    def before_save_checkpoint(self, runner, checkpoint):
        """The same for all that is about to be saved, averaged weights included."""
        found = [
            name
            for part in ('state_dict', 'ema_state_dict')
            for name in self._lost(checkpoint.get(part, {}))
        ]
        if found:
            raise UsageError(self._refusal(runner, found))

    def _lost(self, state):
        return [k for k in nonfinite(state) if k.removeprefix('module.') not in self._by_design]

    def _refusal(self, runner, names):
        if not names:
            return None
        return (
            f'{len(names)} tensors of the model are NaN or infinite, such as {some(names)}. They '
            f'are not saved. {last_checkpoint(runner)}'
        )


def nonfinite(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the floating tensors in a state dict that are not finite."""
    return [k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all()]


def _norms(gradients):
    norms = torch._foreach_norm(gradients)
    return torch.stack([norm.to(norms[0].device, torch.float32) for norm in norms])
