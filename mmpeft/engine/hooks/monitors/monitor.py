"""When the watches look at a run, and how they stop it."""

from mmengine.dist import all_gather_object
from mmengine.hooks import CheckpointHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import find_latest_checkpoint
from torch import nn

from mmpeft.errors import UsageError


class Watch(Hook):
    """Looks at a run early, before each of its checkpoints, and at its end.

    Before a checkpoint means before :class:`CheckpointHook` takes older ones
    away, too. What one rank finds stops all of them.

    Args:
        check_iters: Iterations after which it looks for the first time.
    """

    priority = 'LOW'

    def __init__(self, check_iters: int):
        self.check_iters = check_iters
        self._iterations = 0

    def look(self, runner) -> str | None:
        """What is wrong, as a paragraph; None if nothing is. All ranks call it together."""
        raise NotImplementedError

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        """Look where it is time."""
        self._iterations += 1
        if self._iterations == self.check_iters or _saves(runner):
            self.stop_if_wrong(runner)

    def after_train_epoch(self, runner):
        """Look; a loop over iterations counts as one epoch."""
        self.stop_if_wrong(runner)

    def stop_if_wrong(self, runner) -> None:
        """Look now.

        Raises:
            UsageError: Something is wrong on one of the ranks.
        """
        complaints = all_gather_object(self.look(runner))
        common = len(set(complaints)) == 1
        for rank, complaint in enumerate(complaints):
            if complaint:
                raise UsageError(complaint if common else f'On rank {rank}: {complaint}')


def bare(model: nn.Module) -> nn.Module:
    """A Runner's model without the wrapper of DDP."""
    return model.module if is_model_wrapper(model) else model


def some(names: list[str], most: int = 3) -> str:
    """The first of many names, for a message."""
    return ', '.join(map(repr, names[:most])) + (', ...' if len(names) > most else '')


def last_checkpoint(runner) -> str:
    """Which checkpoint there is to go back to, as a sentence."""
    path = find_latest_checkpoint(runner.work_dir)
    return f'The last checkpoint is {path}.' if path else 'There is no checkpoint yet.'


def _saves(runner):
    return any(
        hook.every_n_train_iters(runner, hook.interval, hook.save_begin)
        or (hook.save_last and hook.is_last_train_iter(runner))
        for hook in runner.hooks
        if isinstance(hook, CheckpointHook) and not hook.by_epoch
    )
