"""Reentrant activation checkpointing behind a frozen stem.

``torch.utils.checkpoint`` in its reentrant form, which transformers'
``gradient_checkpointing_enable``, mmengine's ``activation_checkpointing`` and the
``with_cp`` of mmdet's backbones use, gives no gradient to what is inside unless
an input requires one. Behind a frozen stem none does. Here the input of such a
segment requires one; without checkpoints nothing changes.
"""

import functools

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

_apply = CheckpointFunction.apply


def reach_into_checkpoints() -> None:
    """Let gradients reach what trains in reentrant checkpoints, from now on in this process."""
    CheckpointFunction.apply = _apply_with_gradient


@functools.wraps(_apply)
def _apply_with_gradient(function, preserve, *args):
    requires = any(isinstance(a, Tensor) and a.requires_grad for a in args)
    if requires or not torch.is_grad_enabled() or not (trains := _trains(function)):
        return _apply(function, preserve, *args)
    first = next((a for a in args if isinstance(a, Tensor) and a.is_floating_point()), None)
    if first is not None:
        args = (a.detach().requires_grad_() if a is first else a for a in args)
    elif trains != 'perhaps':  # indices, or keyword arguments alone
        inner, args = function, (*args, torch.ones((), requires_grad=True))
        function = lambda *a: inner(*a[:-1])  # noqa: E731
    return _apply(function, preserve, *args)


def _trains(function):
    """Whether something trains in a module or a method of one; 'perhaps' for other functions."""
    while isinstance(function, functools.partial):
        function = function.func
    owner = function if isinstance(function, nn.Module) else getattr(function, '__self__', None)
    if not isinstance(owner, nn.Module):
        return 'perhaps'
    return any(p.requires_grad for p in owner.parameters())
