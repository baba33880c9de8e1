"""Watching a training loop: stop it, or warn, when something goes wrong silently."""

import warnings
from collections.abc import Iterable, Mapping

import torch
from mmengine.dist import all_gather_object, get_world_size
from torch import nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from mmpeft.errors import TrainingError, UsageError, listed
from mmpeft.injection.guards import warn_of_replaced
from mmpeft.injection.merge import how_to_adapt
from mmpeft.injection.site import adapter_parameters, named_adapters
from mmpeft.injection.wrappers import is_flattened, is_sharded, refuse_deepspeed, unwrapped
from mmpeft.methods.arguments import has_type

from .allocation import Allocation, allocate, around_steps
from .checks.check import Check
from .checks.finite import Finite
from .checks.frozen import Frozen
from .checks.gradients import Gradients
from .checks.movement import Movement
from .checks.penalty import Penalty
from .checks.ranks import Ranks
from .penalty import add_gradients


class Monitor:
    """Watch a training loop of your own, as :class:`~mmpeft.engine.hooks.PEFTHook` does a Runner.

    ``mmpeft.monitor`` is one line between the optimizer and the loop: the rest happens around the
    optimizer's steps. ``optimizer.step()`` raises TrainingError if no gradient reaches an adapter,
    an adapter does not move, the frozen base changes, or loss or gradients are NaN or infinite in
    several steps in a row, and the error says where it begins; single such steps are skipped with
    a warning. It starts the allocators (:func:`mmpeft.allocate`). It looks again when
    ``state_dict`` is called for a checkpoint, and in ``close``, which the end of a ``with`` calls.

    Of a model sharded by ``fully_shard`` each rank watches its own part; whether adapters move,
    and whether ranks are equal, is not looked at. All ranks step, save and close together.

    Args:
        model: After :func:`mmpeft.inject`; may be wrapped (DDP, a LightningModule, compiled), or
            sharded by ``fully_shard``.
        optimizer: The optimizer that trains it, or a wrapper of it.
        steps: Optimizer steps of the whole run, which allocators need.
        check_iters: Steps after which it looks for the first time.
        nonfinite_iters: Steps in a row with NaN or infinite loss or gradients that stop the run.
        check_frozen: Stop if something frozen changes; computes a SHA-256 over the frozen base at
            the start, after ``check_iters`` steps, in ``state_dict`` and in ``close``.
        check_ranks: Under ``torch.distributed``, stop all ranks together and compare their
            models; False where ranks train different models.
        add_penalty: Add the gradient of :func:`mmpeft.penalty` before each step whose loss lacks
            it, for loops whose loss you cannot change. It is not clipped.

    Attributes:
        wrapped: The model as it was given.
        model: The adapted model, without what wraps it.
        sharded: Whether ranks hold parts of it.
        optimizer: The plain optimizer.
        iterations: Since the start; one is a step of the optimizer, or an iteration of a Runner.
        allocation: See :func:`mmpeft.allocate`.
        checks: What is looked for.

    Raises:
        UsageError: The model has no adapters, their parameters are not in the optimizer, a
            method with an allocator has no ``steps``, an argument is not a number of steps, or
            the model is trained by DeepSpeed or FullyShardedDataParallel, which keep gradients
            to themselves.
    """

    _before = 0  # iterations before the start, in a run that was resumed
    had_ended = False  # whether it was resumed with no iteration left

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        steps: int | None = None,
        check_iters: int = 10,
        nonfinite_iters: int = 3,
        check_frozen: bool = True,
        check_ranks: bool = True,
        add_penalty: bool = False,
    ):
        refuse_deepspeed(model, 'monitor')
        _check_count('check_iters', check_iters, 0)
        _check_count('nonfinite_iters', nonfinite_iters, 1)
        if is_flattened(model):
            raise UsageError(
                'mmpeft.monitor does not see the gradients of adapters in '
                'FullyShardedDataParallel. Shard the model by fully_shard, or train without a '
                'monitor.'
            )
        self.wrapped, self.model = model, adapted_model(model)
        with unwrapped(self.model) as bare:
            warn_of_replaced(bare)
        self.optimizer = _plain(optimizer)
        self.check_iters, self.add_penalty = check_iters, add_penalty
        self.sharded = is_sharded(model)
        self.compares = (check_ranks or self.sharded) and get_world_size() > 1
        self.iterations, self._loss = 0, None
        check_optimized(self.optimizer, adapter_parameters(self.model))
        allocated = [a for a in named_adapters(self.model).values() if a.method.allocates]
        if allocated and not (has_type(steps, float) and steps > 0):
            raise UsageError(
                f'{type(allocated[0].method).__name__} decides during training what it keeps, and '
                'needs the number of optimizer steps of the whole run: '
                'mmpeft.monitor(model, optimizer, steps=1000).'
            )
        self.finite = Finite(self, nonfinite_iters)
        self.penalty = Penalty(self)
        self.checks: list[Check] = [self.finite, Gradients(self), self.penalty]
        self.checks += [] if self.sharded else [Movement(self)]
        self.checks += [Frozen(self)] if check_frozen else []
        self.checks += [Ranks(self)] if self.compares and not self.sharded else []
        # Before the allocators, which are to see nothing of a step that is skipped.
        self._handles = around_steps(self.optimizer, self.before_step, self.after_step)
        self._handles += self._watch_loss()
        self.allocation: Allocation = allocate(self.model, self.optimizer, steps or 0)

    @property
    def iteration(self) -> int:
        """The number of the last iteration, counted over resumed runs."""
        return self._before + self.iterations

    def before_step(self) -> None:
        """Guard the step of the optimizer, and add the penalty's gradients if the loss lacks it."""
        for check in self.checks:
            check.before_step()
        if self.finite.guard() and self.add_penalty and not self.penalty.is_in_loss():
            scale = getattr(self.optimizer, 'grad_scale', None)  # of a fused optimizer
            add_gradients(self.model, 1.0 if scale is None else scale)

    def after_step(self) -> None:
        """Count the step, and look at what is due."""
        for check in self.checks:
            check.after_step()
        loss, self._loss = self._loss, None
        self.finite.note({} if loss is None else dict(loss=float(loss)))
        self.advance(scaled=getattr(self.optimizer, 'found_inf', None) is not None)

    def advance(self, stepped: bool = True, scaled: bool = False, saves: bool = False) -> None:
        """Count an iteration, and look at what is due.

        Args:
            stepped: Whether it ended with a step.
            scaled: Whether a gradient scaler may have skipped the step.
            saves: Whether a checkpoint follows.

        Raises:
            TrainingError: Something is wrong, on one of the ranks at least.
        """
        self.iterations += 1
        if stepped:
            self.finite.count(scaled)
        for check in self.checks:
            if check.is_due() or (saves and check.repeats):
                self.stop_if(check.problem())

    def check(self) -> None:
        """Look again, as before a checkpoint; all ranks call it.

        Raises:
            TrainingError: The frozen base changed, weights are not finite, or ranks disagree.
        """
        for check in self.checks:
            if check.repeats:
                self.stop_if(check.problem())

    def stop_if(self, problem: str | None) -> None:
        """Raise TrainingError if there is a problem on one of the ranks."""
        problems = all_gather_object(problem) if self.compares else [problem]
        on_all = len(set(problems)) == 1
        for rank, each in enumerate(problems):
            if each:
                raise TrainingError(each if on_all else f'On rank {rank}: {each}')

    def warn(self, text: str) -> None:
        """Say something that does not stop the run."""
        warnings.warn(text, stacklevel=2)

    def last_checkpoint(self) -> str:
        """A sentence that names the checkpoint to go back to."""
        return 'Go back to your last checkpoint.'

    def state_dict(self, look: bool = True) -> dict:
        """What a resumed run needs.

        Args:
            look: Look first at what must not be saved, as :meth:`check`, but on this rank alone.

        Raises:
            TrainingError: See :meth:`check`.
        """
        for check in self.checks if look else ():
            alone = check.repeats and not isinstance(check, Ranks)
            if alone and (problem := check.problem()):
                raise TrainingError(problem)
        return dict(iteration=self.iteration, allocation=self.allocation.state_dict())

    def load_state_dict(self, state: Mapping) -> None:
        """The reverse of :meth:`state_dict`, before the first step."""
        self._before = state['iteration']
        self.allocation.load_state_dict(state['allocation'])

    def close(self, look: bool = True) -> None:
        """Look for the last time (:meth:`check`), and remove all hooks.

        Raises:
            TrainingError: As :meth:`check`; or a run shorter than ``check_iters`` had adapters
                without a gradient.
        """
        if self._handles:
            try:
                if look:
                    self.check()
                for check in self.checks:
                    check.close()
                for text in self.allocation.unfinished():
                    self.warn(text)
            finally:
                self.detach()

    def detach(self) -> None:
        """Remove all hooks, without a look."""
        while self._handles:
            self._handles.pop().remove()
        self.allocation.close()

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        (self.detach if error else self.close)()

    def _watch_loss(self):
        note = torch.compiler.disable(self._note_loss)  # here, since it imports torch's compiler
        return [self.model.register_forward_hook(note)]

    def _note_loss(self, module, args, output):
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad and not leaf.ndim:
                self._loss = leaf.detach() + (0 if self._loss is None else self._loss)


def adapted_model(model: nn.Module) -> nn.Module:
    """The module that :func:`mmpeft.inject` adapted, in whatever wraps it.

    Raises:
        UsageError: There is none, or more than one.
    """
    found = {path: m for path, m in model.named_modules() if vars(m).get('peft')}
    if len(found) != 1:
        raise UsageError(
            f'The model has several adapted modules, {listed(list(found))}. Give each a monitor.'
            if found
            else f'The model has no adapters. {how_to_adapt(model)}'
        )
    return next(iter(found.values()))


def check_optimized(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Raise UsageError if some parameters are not in an optimizer."""
    optimized = {id(p) for group in optimizer.param_groups for p in group['params']}
    lost = [p for p in parameters if p.requires_grad and id(p) not in optimized]
    if lost:
        raise UsageError(
            f'{len(lost)} adapter parameters are not in the optimizer, so they would never '
            'train. Build it after mmpeft.inject from all parameters that require a gradient. In a '
            'config, the optim_wrapper.constructor leaves them out.'
        )


def _check_count(name, value, least):
    if not has_type(value, int) or value < least:
        raise UsageError(f'{name}={value!r} must be a number of steps >= {least}.')


def _plain(optimizer):
    """An optimizer without what accelerate, Lightning or mmengine wraps around it."""
    while hasattr(optimizer, 'optimizer'):
        optimizer = optimizer.optimizer
    return optimizer
