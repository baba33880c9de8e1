"""Mixed precision on a CPU, which mmengine's wrapper refuses and torch has."""

from contextlib import contextmanager

import torch
from mmengine.optim import OptimWrapper

from mmpeft.registry import OPTIM_WRAPPERS


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(OptimWrapper):
    """Forward passes under bfloat16 autocast.

    bfloat16 has the range of float32, so the loss is not scaled.

    Args:
        **kwargs: See :class:`mmengine.optim.OptimWrapper`.
    """

    @contextmanager
    def optim_context(self, model):
        """The context of a forward pass of ``model``."""
        with super().optim_context(model), torch.autocast('cpu', torch.bfloat16):
            yield
