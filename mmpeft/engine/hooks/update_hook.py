"""Figures and pictures of updates during training, through mmengine's visualizer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isnan

from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmpeft.analysis.kernels import as_image, check_kernel, draw_kernels
from mmpeft.analysis.updates import (
    FIGURES,
    Update,
    adapted_weights,
    figures,
    means,
    update_of,
    without_updates,
)
from mmpeft.injection.patterns import matching, patterns_of
from mmpeft.methods.arguments import check_types, require
from mmpeft.registry import HOOKS

from .unwrap import unwrap


@HOOKS.register_module()
@dataclass(eq=False)
class UpdateHook(Hook):
    """Log figures of dW = phi(W) - W, and pictures of kernels.

    They go to the backends of the visualizer (a JSON file, TensorBoard, W&B): ``update/norm`` and
    the other means of :func:`mmpeft.analysis.updates.means`, ``update_norm/<weight>`` and the other
    figures of each weight that is named, and pictures ``kernels_<weight>``. A figure that is not
    defined (NaN) is not logged. In several processes the first one computes and logs them.

    Belongs under ``custom_hooks``, beside a PEFTHook.

    Raises UsageError for an argument of another type, a number below 1, or an invalid pattern.

    Args:
        interval: Iterations between two logs; the last iteration is logged too.
        weights: Patterns of weights whose own figures are logged.
        kernels: Patterns of convolutions whose kernels are drawn.
        count: Kernels in a picture at most.
    """

    priority = 'LOW'

    interval: int = 500
    weights: str | Sequence[str] | None = ()
    kernels: str | Sequence[str] | None = ()
    count: int = 8

    def __post_init__(self):
        check_types(self)
        for name in ('interval', 'count'):
            require(self, name, getattr(self, name) > 0, 'must be positive.')
        for name in ('weights', 'kernels'):
            patterns_of(getattr(self, name), f'UpdateHook: {name}')

    def before_train(self, runner):
        """Select the weights.

        Raises:
            UsageError: No weight has an adapter, the model is sharded, a pattern matches nothing,
                or a weight to be drawn has no kernel.
        """
        model = unwrap(runner.model)
        found = adapted_weights(model)
        self._logged = matching(found, self.weights, 'UpdateHook: weights', 'adapted weight')
        self._drawn = matching(found, self.kernels, 'UpdateHook: kernels', 'adapted weight')
        for name in self._drawn:
            check_kernel(name, found[name][0].spec)
        for method, number in without_updates(model).items():
            runner.logger.warning(
                f'UpdateHook leaves out {number} adapters of {method}, which changes activations.'
            )

    @master_only
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        last = self.is_last_train_iter(runner)
        if not (last or self.every_n_train_iters(runner, self.interval)):
            return
        rows = figures(self._seen(runner))
        scalars = {f'update/{name}': value for name, value in means(rows).items()}
        for row in (row for row in rows if row.name in self._logged):
            scalars |= {f'update_{name}/{row.name}': getattr(row, name) for name in FIGURES}
        scalars = {name: value for name, value in scalars.items() if not isnan(value)}
        runner.visualizer.add_scalars(scalars, step=runner.iter + 1)

    def _seen(self, runner: Runner) -> Iterator[Update]:
        """All updates, of which some are drawn as they pass."""
        for name, chain in adapted_weights(unwrap(runner.model)).items():
            update = update_of(chain)
            if name in self._drawn:
                image = as_image(draw_kernels(update, self.count))
                runner.visualizer.add_image(f'kernels_{name}', image, runner.iter + 1)
            yield update
