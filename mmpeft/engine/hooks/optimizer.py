"""An optimizer and schedulers for a model whose parameters have changed."""

import copy
from collections.abc import Mapping

from mmengine.optim import LinearLR, OptimWrapperDict
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.runner import Runner

from mmpeft.errors import UsageError


def warm_up_fault(runner: Runner) -> str | None:
    """A paragraph about a warm-up of the learning rate that is longer than the training."""
    schedulers = runner.param_schedulers if isinstance(runner.param_schedulers, list) else []
    for number, scheduler in enumerate(schedulers):
        length = runner.max_epochs if scheduler.by_epoch else runner.max_iters
        rises = isinstance(scheduler, LinearLR) and scheduler.start_factor < scheduler.end_factor
        if rises and not scheduler.begin and scheduler.end > length:
            unit = 'epochs' if scheduler.by_epoch else 'iterations'
            return (
                f'The learning rate warms up for {scheduler.end} {unit}, and the training has '
                f'{length}, so it never reaches its value. Set param_scheduler.{number}.end to '
                f'a number of {unit} that is well below {length}.'
            )
    return None


def rebuild_optimizer(runner: Runner) -> None:
    """Build a Runner's optimizer and schedulers again from its config.

    Raises:
        UsageError: The Runner's config does not describe them, or another optimizer, or several.
    """
    scheduled = runner.param_schedulers is not None
    described = isinstance(runner.cfg.get('optim_wrapper'), Mapping)
    if not described or (scheduled and 'param_scheduler' not in runner.cfg):
        raise UsageError(
            'PEFTHook rebuilds the optimizer and its schedulers from the config, and that of this '
            'Runner does not describe them. Use Runner.from_cfg(cfg) with optim_wrapper and '
            'param_scheduler in it, as dicts.'
        )
    config = copy.deepcopy(runner.cfg.optim_wrapper)
    kind = config.get('constructor', 'DefaultOptimWrapperConstructor')
    with OPTIM_WRAPPER_CONSTRUCTORS.switch_scope_and_registry(None) as registry:
        kind = registry.get(kind) if isinstance(kind, str) else kind
    if 'optimizer' in config and hasattr(kind, 'add_params'):
        config.constructor = _once(kind)
    given, runner.optim_wrapper = runner.optim_wrapper, runner.build_optim_wrapper(config)
    if isinstance(runner.optim_wrapper, OptimWrapperDict):
        raise UsageError(
            'PEFTHook watches one optimizer, and the constructor of this config builds several '
            '(OptimWrapperDict). Give parts of the model rates of their own by '
            'optim_wrapper.paramwise_cfg.'
        )
    if _settings(given) != _settings(runner.optim_wrapper):
        raise UsageError(
            f'This Runner was given the optimizer {_settings(given)}, and its config describes '
            f'{_settings(runner.optim_wrapper)}, from which PEFTHook would build it again. Use '
            'Runner.from_cfg(cfg) with the optimizer that you mean.'
        )
    runner.param_schedulers = None
    runner.scale_lr(runner.optim_wrapper, runner.auto_scale_lr)
    if scheduled:
        schedulers = copy.deepcopy(runner.cfg.param_scheduler)
        runner.param_schedulers = runner.build_param_scheduler(schedulers)


def _settings(optim_wrapper):
    """The optimizer's class, and its arguments as they were given."""
    optimizer = optim_wrapper.optimizer
    return type(optimizer).__name__, getattr(optimizer, 'defaults', {})


def _once(kind):
    """A constructor that lists once what adapters share, in the group of the first of them."""

    class Once(kind):
        def add_params(self, params, module, *args, **kwargs):
            super().add_params(params, module, *args, **kwargs)
            if not kwargs.get('prefix'):
                listed = set()
                for group in params:
                    group['params'] = [p for p in group['params'] if p not in listed]
                    listed.update(group['params'])
                params[:] = [group for group in params if group['params']]

    return Once
