"""An optimizer and schedulers for a model whose parameters have changed."""

import copy

from mmengine.optim import OptimWrapperDict
from mmengine.runner import Runner

from mmpeft.errors import UsageError


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
    if config.get('paramwise_cfg'):
        # Adapters may share parameters, which mmengine otherwise takes for a mistake.
        config.paramwise_cfg.setdefault('bypass_duplicate', True)
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
