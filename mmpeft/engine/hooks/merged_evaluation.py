"""Evaluation in merged weights, at the speed and in the memory of the plain model."""

from mmengine.hooks import Hook
from torch import nn

from mmpeft.errors import UsageError
from mmpeft.injection.merge import MERGED, check_mergeable, merge, unmerge
from mmpeft.injection.site import attached
from mmpeft.quantization import Quantized

from .unwrap import unwrap


class MergedEvaluation(Hook):
    """Merges before the first batch of an evaluation, and restores the adapters after the last.

    The frozen weights wait in host memory, or for a model that is there itself in files of the
    work directory.
    """

    priority = 'HIGHEST'  # after an epoch, so that averages are swapped back into adapters

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        """Merge, after other hooks have put averages into the model."""
        model = unwrap(runner.model)
        if MERGED not in vars(model):
            in_host = next(model.parameters()).device.type == 'cpu'
            merge(model, reversible=True, offload=runner.work_dir if in_host else 'cpu')

    def after_val_epoch(self, runner, metrics=None):
        """Restore the adapters, before anything is saved."""
        restore(unwrap(runner.model))

    before_test_iter = before_val_iter
    after_test_epoch = after_val_epoch


def restore(model: nn.Module) -> None:
    """Undo the merge of an evaluation, if there is one; it may have been interrupted.

    Args:
        model: Not wrapped.
    """
    if MERGED in vars(model):
        unmerge(model)


def check_merged_evaluation(model: nn.Module) -> None:
    """Refuse what merging would make larger or cannot change.

    Args:
        model: Adapted, not wrapped.

    Raises:
        UsageError: A method cannot be merged, or weights are in few bits.
    """
    check_mergeable(attached(model))
    if any(isinstance(parameter, Quantized) for parameter in model.parameters()):
        raise UsageError(
            'evaluate_merged would make plain weights of those in few bits, which take several '
            'times their memory. Leave evaluate_merged or frozen_dtype out.'
        )
