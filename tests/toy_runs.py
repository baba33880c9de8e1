"""Toy runs with hooks that make something go wrong."""

from types import SimpleNamespace

from mmengine.hooks import Hook
from torch import nan

from tests.toy import by_iterations, toy_runner


class Do(Hook):
    """A user's own hook: does something at a stage, at some iterations, counted from 1."""

    def __init__(self, stage, action, at=None):
        def act(runner, batch_idx=None, data_batch=None, outputs=None):
            if at is None or runner.iter + 1 in at:
                action(SimpleNamespace(runner=runner, model=runner.model, batch=data_batch))

        setattr(self, stage, act)


def run(folder, *hooks, method=None, stop=12, interval=100, **changes):
    """Train a toy by iterations with a user's own hooks; they come before the monitors."""
    named = dict(experiment_name=str(folder)) | by_iterations(stop, interval)
    runner = toy_runner(folder, method, **named | changes)
    for hook in hooks:
        runner.register_hook(hook)
    runner.train()
    return runner


def spoil_batch(at):
    return Do('before_train_iter', lambda now: now.batch['inputs'][0].fill_(nan), at)


def on_outputs(name, function, at=range(1000)):
    """Changes what a layer returns, in some iterations."""

    def hook(now):
        def change(module, args, output):
            return function(output) if now.runner.iter + 1 in at else None

        now.model.get_submodule(name).register_forward_hook(change)

    return Do('before_train', hook)


def spoiled(output):
    return output * nan


def rough(output):
    """Finite, with gradients that are not: the root of zero."""
    return output + (output * 0).sqrt()


def all_values(runner):
    return {key: value.clone() for key, value in runner.model.state_dict().items()}
