"""One training step of a variant: its time by phases, its memory, its operations."""

from contextlib import nullcontext

import torch
from operations import Operations
from rounds import Clock, Phases
from saved import saved_bytes, storage_bytes
from torch import Tensor, nn
from variants import Variant, trained
from workloads import Workload

# Steps leave the weights where they are, and so the numbers that are multiplied.
LEARNING_RATE = 1e-9


class Trial:
    """A variant of a workload, ready to step.

    Args:
        model: In training mode.
        batch: Its input.
        device: Of both.
        amp: Dtype of autocast, or None.
        optimizes: Whether AdamW steps on what trains.
        needs_input_gradient: Whether the input requires a gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Tensor,
        device: str = 'cpu',
        amp: torch.dtype | None = None,
        optimizes: bool = True,
        needs_input_gradient: bool = False,
    ):
        self.model, self.device, self.amp = model, device, amp
        self.batch = batch.detach().clone().requires_grad_(needs_input_gradient)
        self.parameters = trained(model)
        self.optimizer = None
        if optimizes and self.parameters:
            self.optimizer = torch.optim.AdamW(self.parameters, LEARNING_RATE)

    @classmethod
    def of(cls, variant: Variant, workload: Workload, network, rank, device='cpu', **kwargs):
        """The trial of a variant of a built workload."""
        model = variant.of(network, rank)
        needs = workload.is_inner or not trained(model)
        return cls(model, workload.batch(device), device, needs_input_gradient=needs, **kwargs)

    def forward(self) -> Tensor:
        """The loss: the mean square of each output."""
        cast = torch.autocast(self.device, self.amp) if self.amp else nullcontext()
        with cast:
            outputs = self.model(self.batch)
        outputs = [outputs] if torch.is_tensor(outputs) else outputs
        return sum(output.float().square().mean() for output in outputs)

    def step(self) -> Phases:
        """Seconds of forward, backward and optimizer."""
        clock = Clock(self.device)
        loss = self.forward()
        clock.mark()
        loss.backward()
        clock.mark()
        if self.optimizer:
            self.optimizer.step()
        self.clear()
        clock.mark()
        return dict(zip(('forward', 'backward', 'optimizer'), clock.seconds(), strict=True))

    def clear(self) -> None:
        """Drop all gradients."""
        self.batch.grad = None
        for parameter in self.parameters:
            parameter.grad = None

    def survey(self) -> dict:
        """What does not depend on the clock; the first steps, which warm up, are made here.

        Saved bytes and operations are those with gradients flowing to the
        input in all variants, as they do inside a network: what a variant has
        more than the floor is then its adapters' own.

        Returns:
            ``trained`` parameters, ``saved`` bytes, ``operations`` of forward
            and backward, and ``peak`` bytes on a GPU (None on a CPU): those
            of the variant alone, with its weights and optimizer state.
        """
        needs_input_gradient = self.batch.requires_grad
        self.batch.requires_grad_(True)
        with saved_bytes(self.model) as saved, Operations() as operations:
            loss = self.forward()
            forward = operations.count
            loss.backward()
        self.clear()
        self.batch.requires_grad_(needs_input_gradient)
        self.step()
        return dict(
            trained=sum(parameter.numel() for parameter in self.parameters),
            saved=sum(saved.values()),
            operations=dict(forward=forward, backward=operations.count - forward),
            peak=self.peak() if self.device != 'cpu' else None,
        )

    def peak(self) -> int:
        """Bytes that a step takes at most on a GPU, all other variants' left out."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        others = torch.cuda.memory_allocated()
        self.step()
        return torch.cuda.max_memory_allocated() - others + self.resting()

    def resting(self) -> int:
        """Bytes of weights and optimizer state."""
        state = self.optimizer.state.values() if self.optimizer else ()
        moments = [t for values in state for t in values.values() if torch.is_tensor(t)]
        return storage_bytes([*self.model.parameters(), *self.model.buffers(), *moments])
