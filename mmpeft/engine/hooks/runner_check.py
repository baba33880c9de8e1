"""Refusing Runners that cannot train an adapted model."""

from mmengine.hooks import Hook
from mmengine.model import BaseAveragedModel
from mmengine.runner import Runner
from torch import nn

from mmpeft.errors import UsageError
from mmpeft.injection.site import attached
from mmpeft.injection.wrappers import is_sharded


def check_runner(runner: object) -> None:
    """Refuse a Runner that wraps or shards the model before a hook can adapt it.

    Raises:
        UsageError: Says what to write instead.
    """
    if not isinstance(runner, Runner):
        raise UsageError(
            f'PEFTHook works in mmengine.runner.Runner, not in {type(runner).__name__}, whose '
            'strategy prepares the model before a hook can adapt it. Take runner_type and strategy '
            'out of the config. To shard the model, train with --shard (shard=True).'
        )
    if is_sharded(runner.model):
        raise UsageError(
            f'model_wrapper_cfg has sharded the model ({type(runner.model).__name__}) before '
            'PEFTHook can adapt it. Leave model_wrapper_cfg out, and train with --shard '
            '(shard=True), or shard the model in a loop of your own (docs/api.md, On several GPUs).'
        )


def check_alone(runner: Runner, kind: type[Hook]) -> None:
    """Refuse two hooks that adapt the model.

    Args:
        runner: With its hooks.
        kind: The type of hooks that adapt.

    Raises:
        UsageError: There are several.
    """
    hooks = [hook for hook in runner.hooks if isinstance(hook, kind)]
    if len(hooks) > 1:
        raise UsageError(
            f'The config has {len(hooks)} hooks of type PEFTHook, and only one can adapt the '
            'model. Give one of them a list of methods, each with its targets: '
            'method=[dict(method=..., targets=...), ...].'
        )


def check_teacher(runner: Runner, model: nn.Module) -> None:
    """Refuse means of parameters that were paired before the model was adapted.

    mmdet's hook takes them pair by pair whatever their names, and a model that averages its own
    encoder does not find the names of the plain one.

    Args:
        runner: With its hooks.
        model: Adapted, not wrapped.

    Raises:
        UsageError: The student and the teacher have other parameters, or the model averages.
    """
    for name, module in model.named_modules():
        if isinstance(module, BaseAveragedModel) and attached(model):
            raise UsageError(
                f'{type(model).__name__} keeps an average of its own weights in {name!r}, which '
                'has no place for adapters. It cannot train with adapters. Train it without '
                'PEFTHook, and adapt the model that is trained from it afterwards.'
            )
    if not any(type(hook).__name__ == 'MeanTeacherHook' for hook in runner.hooks):
        return
    student, teacher = (
        {name: p.shape for name, p in getattr(model, part).named_parameters()}
        for part in ('student', 'teacher')
    )
    if student != teacher:
        raise UsageError(
            'MeanTeacherHook averages the parameters of the student into those of the teacher, and '
            'adapters make them different. A semi-supervised detector cannot train with adapters. '
            "Train its detector alone, by the detector's own config, or leave PEFTHook out."
        )
