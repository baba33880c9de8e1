"""When a monitor checks a run, and how it stops it."""

from mmengine.dist import all_gather_object
from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import Runner, find_latest_checkpoint

from mmpeft.errors import TrainingError


class Monitor(Hook):
    """Checks a run early, before each of its checkpoints, and at its end.

    The check comes before :class:`CheckpointHook` removes older checkpoints. A
    problem on one rank stops all of them.

    Args:
        check_iters: Iterations after which it checks for the first time.
    """

    priority = 'LOW'

    def __init__(self, check_iters: int):
        self.check_iters = check_iters
        self.iterations = 0

    def check(self, runner: Runner) -> str | None:
        """What is wrong, as a paragraph; None if nothing is. All ranks call it together."""
        raise NotImplementedError

    def is_due(self, runner: Runner) -> bool:
        """Whether to check after this iteration; equal on all ranks."""
        return self.iterations == self.check_iters or _saves(runner)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.iterations += 1
        if self.is_due(runner):
            self.stop_if_wrong(runner)

    def after_train_epoch(self, runner):
        """Check; a loop over iterations counts as one epoch."""
        self.stop_if_wrong(runner)

    def stop_if_wrong(self, runner: Runner) -> None:
        """Check now, and raise TrainingError if something is wrong on one of the ranks."""
        problems = all_gather_object(self.check(runner))
        on_all = len(set(problems)) == 1
        for rank, problem in enumerate(problems):
            if problem:
                raise TrainingError(problem if on_all else f'On rank {rank}: {problem}')


def listed(names: list[str], most: int = 3) -> str:
    """The first of many names, for a message."""
    return ', '.join(map(repr, names[:most])) + (', ...' if len(names) > most else '')


def last_checkpoint(runner: Runner) -> str:
    """A sentence that names the checkpoint to go back to."""
    path = find_latest_checkpoint(runner.work_dir)
    return f'The last checkpoint is {path}.' if path else 'There is no checkpoint yet.'


def _saves(runner):
    return any(
        hook.every_n_train_iters(runner, hook.interval, hook.save_begin)
        or (hook.save_last and hook.is_last_train_iter(runner))
        for hook in runner.hooks
        if isinstance(hook, CheckpointHook) and not hook.by_epoch
    )
