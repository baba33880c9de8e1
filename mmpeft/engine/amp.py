"""Mixed precision on a CPU, which mmengine's wrapper refuses and torch has."""

from contextlib import contextmanager
from functools import wraps

import torch
from mmengine.optim import OptimWrapper

from mmpeft.registry import OPTIM_WRAPPERS


def widen_operators() -> None:
    """Let mmcv's operators on a CPU, which have no bfloat16, take it and compute in float32."""
    try:
        from mmcv import _ext as operators
    except ImportError:
        return
    for name, function in vars(operators).items():
        if callable(function) and not hasattr(function, '__wrapped__'):
            setattr(operators, name, _widened(function))


def _widened(function):
    @wraps(function)
    def call(*args, **kwargs):
        given = [*args, *kwargs.values()]
        tensors = [value for value in given if isinstance(value, torch.Tensor)]
        narrow = {id(t): t for t in tensors if t.is_cpu and t.dtype == torch.bfloat16}
        wide = {key: tensor.float() for key, tensor in narrow.items()}
        kwargs = {key: wide.get(id(value), value) for key, value in kwargs.items()}
        result = function(*(wide.get(id(value), value) for value in args), **kwargs)
        for key, tensor in narrow.items():
            tensor.data.copy_(wide[key])  # operators write into some of their arguments
        return result

    return call


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(OptimWrapper):
    """Forward passes under bfloat16 autocast.

    bfloat16 has the range of float32, so the loss is not scaled.

    Args:
        **kwargs: See :class:`mmengine.optim.OptimWrapper`.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        widen_operators()

    @contextmanager
    def optim_context(self, model):
        """The context of a forward pass of ``model``."""
        with super().optim_context(model), torch.autocast('cpu', torch.bfloat16):
            yield
