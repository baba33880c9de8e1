"""Whether losses, gradients and weights are finite."""

from math import isfinite

import torch
from torch import Tensor, distributed

from mmpeft.checkpoint.keys import excluded_keys
from mmpeft.errors import TrainingError, listed
from mmpeft.injection.wrappers import local_part

from .check import Check
from .origin import Origin, values_of

SCALER_PATIENCE = 10
"""Steps skipped by a gradient scaler that count as one that is not finite by itself."""


class Finite(Check):
    """Skips steps whose gradients are not finite, and stops a run of such steps.

    A skipped step changes no weight, optimizer state or allocator. After
    ``nonfinite_iters`` of them in a row the run stops. In the last one all
    layers are checked, so that the error says where it begins. A step that a
    gradient scaler skips at a finite loss is how it finds its scale, and
    counts a tenth. Weights that are not finite are saved in no checkpoint;
    buffers that are so from the start, such as masks, may be.

    Args:
        nonfinite_iters: Steps in a row that stop the run; at least 1.
    """

    def __init__(self, monitor, nonfinite_iters: int):
        super().__init__(monitor)
        self.limit = nonfinite_iters
        self.row = self.steps = 0  # in a row; a step that a scaler skips counts a tenth in row
        self.origin = None
        self._losses, self._skipped, self._stepped, self._seen = {}, False, False, False
        self._from_start = set(_nonfinite(dict(monitor.model.named_buffers())))
        self._check_layers()

    def guard(self) -> bool:
        """Before a step: whether the gradients are finite; if not, take them away."""
        optimizer = self.monitor.optimizer
        parameters = [p for group in optimizer.param_groups for p in group['params']]
        gradients = [p.grad for p in parameters if p.grad is not None]
        self._stepped = True
        if not self._are_finite(gradients):
            self._skipped = True
            for parameter in parameters:
                parameter.grad = None
        return not self._skipped

    def _are_finite(self, gradients):
        """On all ranks, where each holds a part of them."""
        parts = [values_of(part) for g in gradients if (part := local_part(g)).numel()]
        norms = torch._foreach_norm(parts) if parts else ()
        norms = [norm.to(norms[0].device, torch.float32) for norm in norms]
        finite = not norms or bool(torch.stack(norms).isfinite().all())
        if not self.monitor.sharded:
            return finite
        flag = torch.tensor(float(finite), device=next(self.monitor.model.parameters()).device)
        distributed.all_reduce(flag, distributed.ReduceOp.MIN)
        return bool(flag)

    def note(self, losses: dict[str, float]) -> None:
        """Take note of losses by name."""
        self._seen = self._seen or bool(losses)
        self._losses |= {k: v for k, v in losses.items() if not isfinite(v)}

    def count(self, scaled: bool) -> None:
        """After a step, or after a gradient scaler (``scaled``) may have skipped one."""
        skipped = self._skipped or (scaled and not self._stepped)
        self.steps += 1
        if not skipped and not self._losses:
            self.row = self.steps = 0
        elif scaled and not self._losses:
            self.row += 1
        else:
            self.row += SCALER_PATIENCE
            self.monitor.warn(f'Iteration {self.monitor.iteration}: {self._account(skipped)}.')
        if self.row >= SCALER_PATIENCE * self.limit:
            raise TrainingError(self._report(skipped))
        self._losses, self._skipped, self._stepped, self._seen = {}, False, False, False
        self._check_layers()

    def _check_layers(self):
        near = self.row >= SCALER_PATIENCE * (self.limit - 1)
        if near and self.origin is None:
            self.origin = Origin(self.monitor.model)
        elif near:
            self.origin.reset()
        elif self.origin is not None:
            self.origin.close()
            self.origin = None

    def _account(self, skipped):
        losses = ', '.join(f'{name} is {value}' for name, value in self._losses.items())
        losses = losses or ('the loss is finite' if self._seen else 'the loss was not seen')
        if not skipped:
            return f'{losses}, the gradients are finite'
        return f'{losses}, gradients are NaN or infinite, and the step was skipped'

    def _report(self, skipped):
        weights = self._nonfinite(self._own())
        held = f'Weights that are not finite: {listed(weights)}. ' if weights else ''
        return (
            f'Loss or gradients were NaN or infinite in {self.steps} consecutive steps '
            f'(nonfinite_iters={self.limit}), up to iteration {self.monitor.iteration}: '
            f'{self._account(skipped)}. '
            f'{self.origin} {held}{self.monitor.last_checkpoint()} Check the data of these '
            'iterations, lower the learning rate, clip gradients (optim_wrapper.clip_grad of a '
            'config), or use bfloat16 instead of float16.'
        )

    def problem(self):
        """Weights that are not finite, before they replace a checkpoint."""
        return self.refusal(self._own())

    def refusal(self, *states: dict[str, Tensor]) -> str | None:
        """The same for state dicts that are about to be saved."""
        names = [name for state in states for name in self._nonfinite(state)]
        if not names:
            return None
        return (
            f'{len(names)} tensors of the model are NaN or infinite, such as {listed(names)}. '
            f'They are not saved. {self.monitor.last_checkpoint()}'
        )

    def close(self):
        if self.origin is not None:
            self.origin.close()

    def _own(self):
        """What a checkpoint holds, of which this rank may have parts."""
        excluded, state = excluded_keys(self.monitor.model), self.monitor.model.state_dict()
        return {key: local_part(value) for key, value in state.items() if key not in excluded}

    def _nonfinite(self, state):
        return [k for k in _nonfinite(state) if k.removeprefix('module.') not in self._from_start]


def _nonfinite(state):
    return [k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all()]
