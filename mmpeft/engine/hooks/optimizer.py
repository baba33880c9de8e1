"""An optimizer and schedulers for a model whose parameters have changed."""

import copy

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
        UsageError: The Runner was made without a config, or for several optimizers.
    """
    if 'optim_wrapper' not in runner.cfg:
        raise UsageError(
            'PEFTHook rebuilds the optimizer from the config, and this Runner was made without '
            'one. Use Runner.from_cfg(cfg) with optim_wrapper and param_scheduler in it.'
        )
    config = copy.deepcopy(runner.cfg.optim_wrapper)
    kind = config.get('constructor', 'DefaultOptimWrapperConstructor')
    with OPTIM_WRAPPER_CONSTRUCTORS.switch_scope_and_registry(None) as registry:
        kind = registry.get(kind) if isinstance(kind, str) else kind
    if 'optimizer' in config and hasattr(kind, 'add_params'):
        config.constructor = _once(kind)
    runner.optim_wrapper = runner.build_optim_wrapper(config)
    if isinstance(runner.optim_wrapper, OptimWrapperDict):
        raise UsageError(
            'PEFTHook watches one optimizer, and the constructor of this config builds several '
            '(OptimWrapperDict). Give parts of the model rates of their own by '
            'optim_wrapper.paramwise_cfg.'
        )
    scheduled, runner.param_schedulers = runner.param_schedulers is not None, None
    runner.scale_lr(runner.optim_wrapper, runner.auto_scale_lr)
    if scheduled:
        schedulers = copy.deepcopy(runner.cfg.param_scheduler)
        runner.param_schedulers = runner.build_param_scheduler(schedulers)


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
