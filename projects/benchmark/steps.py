"""One step of a variant, in training or in evaluation: its time by phases, memory, operations."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain, pairwise

import torch
from records import PHASES
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from variants import trained

from mmpeft.analysis.operations import Operations
from mmpeft.quantization import stored_parts

# Steps leave the weights where they are, and so the numbers that are multiplied.
LEARNING_RATE = 1e-9


class Step:
    """A variant of a workload, ready to take steps.

    A step of training is forward, backward and AdamW. One of evaluation is a
    forward pass without gradients, with weights built once before, as PEFTHook
    evaluates.

    Args:
        model: The variant.
        batch: Its input.
        device: Of both.
        amp: Dtype of autocast, or None.
        is_inner: Whether the input requires a gradient; it does in any case
            where nothing else does.
        evaluates: Whether steps are of evaluation.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Tensor,
        device: str = 'cpu',
        amp: torch.dtype | None = None,
        is_inner: bool = False,
        evaluates: bool = False,
    ):
        self.model, self.device, self.amp, self.evaluates = model, device, amp, evaluates
        self.parameters = trained(model)
        self.batch = batch.detach().clone().requires_grad_(is_inner or not self.parameters)
        self.optimizer = None
        if evaluates:
            model.eval()
        elif self.parameters:
            self.optimizer = torch.optim.AdamW(self.parameters, LEARNING_RATE)

    def __call__(self) -> dict[str, float]:
        """Seconds of each phase."""
        if not self.evaluates:
            return self.timed(self.loss, Tensor.backward, self.update)
        with torch.no_grad():
            return self.timed(self.forward)

    def median_of(self, times: int) -> dict[str, float]:
        """Several steps in a row as one, by the median of each phase."""
        calls = [self() for _ in range(times)]
        return {phase: statistics.median(call[phase] for call in calls) for phase in calls[0]}

    def timed(self, *actions) -> dict[str, float]:
        """Seconds of consecutive actions, each given what the one before has returned.

        On a GPU nothing waits between them, as in training, so that what the
        CPU prepares while the GPU works costs nothing here either.
        """
        is_cuda = self.device != 'cpu'
        if is_cuda:
            torch.cuda.synchronize()
        marks, passed = [_now(is_cuda)], ()
        for action in actions:
            result = action(*passed)
            passed = () if result is None else (result,)
            marks.append(_now(is_cuda))
        if is_cuda:
            torch.cuda.synchronize()
            seconds = [begin.elapsed_time(end) / 1e3 for begin, end in pairwise(marks)]
        else:
            seconds = [end - begin for begin, end in pairwise(marks)]
        return dict(zip(PHASES, seconds, strict=False))

    def forward(self):
        """The outputs of the model."""
        with torch.autocast(self.device, self.amp) if self.amp else nullcontext():
            return self.model(self.batch)

    def loss(self) -> Tensor:
        """The sum of the mean squares of all outputs."""
        outputs = self.forward()
        outputs = [outputs] if torch.is_tensor(outputs) else outputs
        return sum(output.float().square().mean() for output in outputs)

    def update(self) -> None:
        """Let the optimizer step, and drop all gradients."""
        if self.optimizer:
            self.optimizer.step()
        for tensor in (self.batch, *self.parameters):
            tensor.grad = None

    def survey(self) -> dict:
        """What does not depend on the clock; makes the first steps, which warm up.

        Saved bytes and operations are those with gradients flowing to the
        input in all variants, as they do inside a network: what a variant has
        more than the floor is then its adapters' own.

        Returns:
            Fields of :class:`records.Result`.
        """
        found = dict(trained=sum(parameter.numel() for parameter in self.parameters))
        if not (self.evaluates or is_compiled(self.model)):
            needs_input_gradient = self.batch.requires_grad
            self.batch.requires_grad_(True)
            with saved_bytes(self.model) as saved, Operations() as operations:
                self.loss().backward()
            self.batch.requires_grad_(needs_input_gradient)
            self.update()
            found |= dict(saved=sum(saved.values()), operations=operations.count)
        self()
        return found | dict(peak=None if self.device == 'cpu' else self.peak())

    def peak(self) -> int:
        """Bytes that a step takes at most on a GPU, without what other variants hold."""
        torch.cuda.reset_peak_memory_stats()
        others = torch.cuda.memory_allocated()
        self()
        state = self.optimizer.state.values() if self.optimizer else ()
        moments = [t for values in state for t in values.values() if torch.is_tensor(t)]
        resting = chain(self.model.parameters(), self.model.buffers(), moments)
        own = {k: size for t in resting for k, size in _storages(t).items()}
        return torch.cuda.max_memory_allocated() - others + sum(own.values())


def is_compiled(model: nn.Module) -> bool:
    """Whether a part of a model is, so that neither hooks nor counters see what it does."""
    return any(module._compiled_call_impl is not None for module in model.modules())


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[dict[int, int]]:
    """Note what is saved for backward while the context lasts.

    A storage that several operations save counts once and whole. Parameters
    and buffers of the model are there anyway and do not count; nor does what
    a custom function keeps elsewhere than in ``save_for_backward``.

    Yields:
        Bytes of each storage by its address; filled as forward runs.
    """
    there = {k for t in chain(model.parameters(), model.buffers()) for k in _storages(t)}
    held = {}

    def note(tensor):
        held.update({k: size for k, size in _storages(tensor).items() if k not in there})
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        yield held


def _storages(tensor):
    """Bytes of what a tensor is stored in, by address."""
    storages = (part.untyped_storage() for part in stored_parts(tensor).values())
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def _now(is_cuda):
    if not is_cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
