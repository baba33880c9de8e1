"""Methods that reallocate their parameters during training."""

import warnings
from collections import defaultdict
from collections.abc import Callable
from weakref import WeakSet

import torch
from torch import nn
from torch.optim import Optimizer

from mmpeft.errors import UsageError
from mmpeft.injection.site import named_adapters
from mmpeft.injection.wrappers import refuse_deepspeed, refuse_parts, unwrapped
from mmpeft.methods import Allocator

RUNNING = WeakSet()  # adapters that allocators follow


def around_steps(optimizer: Optimizer, before: Callable, after: Callable) -> list:
    """Call functions before and after each step of an optimizer; returns handles to remove.

    A step that is given a closure computes the gradients itself: ``before`` follows the closure.
    Steps by which torch.distributed.checkpoint fills an optimizer's state are none.
    """

    @torch.compiler.disable
    def pre_hook(optimizer, args, kwargs):
        if _fills_state(optimizer):
            return None
        closure = kwargs.get('closure', args[1] if len(args) > 1 else None)
        if closure is None:
            before()
            return None

        def closed():
            loss = closure()
            before()
            return loss

        return args[:1], kwargs | dict(closure=closed)

    @torch.compiler.disable
    def post_hook(optimizer, *_):
        if not _fills_state(optimizer):
            after()

    return [
        optimizer.register_step_pre_hook(pre_hook),
        optimizer.register_step_post_hook(post_hook),
    ]


def _fills_state(optimizer):
    """Whether all rates are 0 and so are all gradients, none of which is left out."""
    groups = optimizer.param_groups
    if any(group.get('lr') != 0 for group in groups):
        return False
    parameters = [p for group in groups for p in group['params'] if p.requires_grad]
    return all(p.grad is not None and not p.grad.any() for p in parameters)


class Allocation:
    """Handle for the running allocators of a model, called before and after each optimizer step."""

    def __init__(self, allocators: list[Allocator], optimizer: Optimizer):
        self.allocators, self._optimizer = allocators, optimizer
        self._handles = []
        if allocators:
            self._handles = around_steps(optimizer, self._before, self._after)
            RUNNING.update(a for each in allocators for a in each.adapters.values())

    def _before(self):
        for allocator in self.allocators:
            parameters = (p for a in allocator.adapters.values() for p in a.parameters())
            if not allocator.step and any(self._optimizer.state.get(p) for p in parameters):
                warnings.warn(
                    'The optimizer has already trained these adapters, and their allocator is at '
                    'step 0. To resume a run, load what monitor.state_dict() (or that of '
                    'mmpeft.allocate) gave with load_state_dict; otherwise build a new optimizer.',
                    stacklevel=2,
                )
            allocator.before_step()

    def _after(self):
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

    def unfinished(self) -> list[str]:
        """What to say of allocators that began and did not come to their end."""
        return [
            f'{type(next(iter(allocator.adapters.values())).method).__name__} was to decide what '
            f'it keeps within {allocator.steps} steps, and the run ended after {allocator.step}. '
            'Resume it, or give the steps of the optimizer, without those of accumulated batches.'
            for allocator in self.allocators
            if 0 < allocator.step < allocator.steps
        ]

    def close(self) -> None:
        """Remove the hooks of the optimizer."""
        for handle in self._handles:
            handle.remove()
        for allocator in self.allocators:
            RUNNING.difference_update(allocator.adapters.values())
            allocator.close()


def allocate(model: nn.Module, optimizer: Optimizer, steps: int) -> Allocation:
    """Start the allocators of a model's methods, such as AdaLoRA's, which moves ranks.

    :class:`~mmpeft.engine.hooks.PEFTHook` does it in a Runner, and :func:`mmpeft.monitor` in a
    loop of your own; without the monitor call it once, after the optimizer was built.

    Args:
        model: After :func:`mmpeft.inject`.
        optimizer: The optimizer that trains it.
        steps: Optimizer steps of the whole run.

    Raises:
        UsageError: A method has an allocator, and its factors are sharded or in DeepSpeed, or
            allocators follow it already.
    """
    by_type = defaultdict(dict)
    with unwrapped(model) as bare:
        for path, adapter in named_adapters(bare).items():
            by_type[type(adapter.method)][path] = adapter
    allocators = []
    for adapters in by_type.values():
        method = next(iter(adapters.values())).method
        if method.allocates:
            refuse_parts(adapters.values(), 'allocate')
            refuse_deepspeed(model, 'allocate')
        allocators.append(method.allocator(adapters, steps))
    allocators = [allocator for allocator in allocators if allocator is not None]
    if any(not RUNNING.isdisjoint(each.adapters.values()) for each in allocators):
        raise UsageError(
            'The allocators of this model run already (mmpeft.monitor starts them too), and each '
            'step would count twice. Close the first ones: monitor.close().'
        )
    return Allocation(allocators, optimizer)
