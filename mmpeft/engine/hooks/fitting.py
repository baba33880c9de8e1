"""Refusing a checkpoint that does not fit a Runner's model.

mmengine prints what does not fit, goes on with initial values, and ends as if all were well.
"""

from collections.abc import Mapping

from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner

from mmpeft.engine.datasets import check_datasets
from mmpeft.engine.loading import KEPT, load_fitting, load_whole, manifest_of, unplaced
from mmpeft.errors import UsageError

from .unwrap import unwrap


class FittingHook(Hook):
    """Checks data and what is loaded in a run without PEFTHook, which does so itself."""

    def before_run(self, runner):
        """See :func:`~mmpeft.engine.datasets.check_datasets`."""
        check_datasets(runner, unwrap(runner.model))

    def after_load_checkpoint(self, runner, checkpoint):
        """Refuse adapters, and see :func:`load_checked`."""
        manifest, name = manifest_of(checkpoint), _name(runner)
        if manifest is not None:
            raise UsageError(unplaced(manifest, name, runner.cfg.filename))
        load_checked(runner, checkpoint)


def load_checked(runner: Runner, checkpoint: Mapping, check_whole: bool = True) -> None:
    """Load a checkpoint that a Runner is about to load.

    To test and to resume it has to have all that the model has. Training may
    start from one of other heads, and the log then says what was left out.

    Args:
        runner: While it loads.
        checkpoint: Complete, without the frozen base left out.
        check_whole: False accepts what does not fit in testing and resuming, too.

    Raises:
        UsageError: It does not fit.
    """
    model, name = unwrap(runner.model), _name(runner)
    starts = isinstance(runner.optim_wrapper, OptimWrapper) and not runner._resume
    if check_whole and not starts:
        load_whole(model, checkpoint, name)
        return
    left_out = load_fitting(model, checkpoint)
    if left_out:
        runner.logger.warning(f'{name}: {left_out}. {KEPT}')


def _name(runner):
    return repr(runner._load_from) if runner._load_from else 'The checkpoint'
