"""Mixed precision, also on a CPU, where mmengine's wrapper refuses it and torch has it."""

from contextlib import contextmanager
from functools import wraps

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.optim import OptimWrapper

from mmpeft.errors import UsageError
from mmpeft.registry import OPTIM_WRAPPERS

from .config import class_name, print_on_master


def enable_amp(cfg: Config) -> None:
    """Train in mixed precision.

    Raises:
        UsageError: The optimizer wrapper is neither ``OptimWrapper`` nor
            ``AmpOptimWrapper``.
    """
    kind = class_name(cfg.optim_wrapper) or 'OptimWrapper'
    if kind not in ('OptimWrapper', 'AmpOptimWrapper'):
        raise UsageError(
            f'--amp: optim_wrapper.type={kind!r} has no mixed-precision form. Set it to '
            "'AmpOptimWrapper' in the config, or leave --amp out."
        )
    cfg.optim_wrapper.type = 'AmpOptimWrapper'
    cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')


def prepare_precision(cfg: Config) -> None:
    """Let ``AmpOptimWrapper`` work on a machine without an accelerator, in bfloat16.

    Raises:
        UsageError: The config asks for another precision there.
    """
    wrapper = cfg.get('optim_wrapper') or {}
    if class_name(wrapper) != 'AmpOptimWrapper' or get_device() != 'cpu':
        return
    dtype = str(wrapper.get('dtype') or 'bfloat16').removeprefix('torch.')
    if dtype != 'bfloat16':
        raise UsageError(
            f'Mixed precision in {dtype} needs an accelerator, and torch sees none here. Set '
            "optim_wrapper.dtype='bfloat16', which CPUs have, or optim_wrapper.type='OptimWrapper'."
        )
    for key in ('dtype', 'loss_scale', 'use_fsdp'):
        wrapper.pop(key, None)
    wrapper.type = 'mmpeft.CPUAmpOptimWrapper'
    print_on_master(
        'Mixed precision is in bfloat16, without scaling the loss: torch sees no accelerator.'
    )


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
