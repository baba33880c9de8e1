"""Methods that reallocate their parameters during training."""

from collections import defaultdict

from torch import nn
from torch.optim import Optimizer

from mmpeft.injection.site import named_adapters
from mmpeft.injection.wrappers import refuse_sharded, unwrapped
from mmpeft.methods import Allocator


class Allocation:
    """Calls the allocators of a model's methods before and after every optimizer step."""

    def __init__(self, allocators: list[Allocator], optimizer: Optimizer):
        self.allocators = allocators
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def _before(self, *_):
        for allocator in self.allocators:
            allocator.before_step()

    def _after(self, *_):
        for allocator in self.allocators:
            allocator.step += 1
            allocator.after_step()

    def state_dict(self) -> list[dict]:
        """The states of all allocators, in order."""
        return [allocator.state_dict() for allocator in self.allocators]

    def load_state_dict(self, states: list[dict]) -> None:
        """The reverse of :meth:`state_dict`."""
        for allocator, state in zip(self.allocators, states, strict=True):
            allocator.load_state_dict(state)

    def close(self) -> None:
        """Remove the hooks of the optimizer."""
        for handle in self._handles:
            handle.remove()
        for allocator in self.allocators:
            allocator.close()


def allocate(model: nn.Module, optimizer: Optimizer, steps: int) -> Allocation:
    """Start the allocators of a model's methods, such as AdaLoRA's, which moves ranks.

    :class:`~mmpeft.engine.hooks.PEFTHook` does it in a Runner; in a loop of your own
    call it once, after the optimizer was built.

    Args:
        model: After :func:`mmpeft.inject`.
        optimizer: The optimizer that trains it.
        steps: Optimizer steps of the whole run.

    Raises:
        UsageError: A method has an allocator, and the model is sharded.
    """
    by_type = defaultdict(dict)
    with unwrapped(model) as bare:
        for path, adapter in named_adapters(bare).items():
            by_type[type(adapter.method)][path] = adapter
    allocators = []
    for adapters in by_type.values():
        method = next(iter(adapters.values())).method
        allocators.append(method.allocator(adapters, steps))
    allocators = [allocator for allocator in allocators if allocator is not None]
    if allocators:
        refuse_sharded(model, 'allocate')
    return Allocation(allocators, optimizer)
