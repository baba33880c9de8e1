"""Deciding during training which parameters to keep."""

from collections.abc import Mapping
from copy import deepcopy
from math import inf

import torch
from torch import Tensor

from mmpeft.errors import UsageError

from .adapter import Adapter
from .arguments import require
from .base import Method


class Allocator:
    """Acts around every optimizer step on all adapters of one method.

    :func:`mmpeft.allocate` calls it from hooks of the optimizer, so that it
    works with gradient accumulation, gradient scaling and any training loop.

    Args:
        adapters: By path in the model; each adapter once.
        steps: Optimizer steps of the whole run.

    Attributes:
        stored: Names of the attributes that a resumed run needs: tensors, or
            dicts of tensors, by the path of their adapter.
    """

    stored: tuple[str, ...] = ()

    def __init__(self, adapters: Mapping[str, Adapter], steps: int):
        self.adapters = dict(adapters)
        self.steps = steps
        self.step = 0
        for adapter in self.adapters.values():
            adapter.allocated = True

    def before_step(self) -> None:
        """Called with gradients computed; a parameter whose gradient is set to None stays."""

    def after_step(self) -> None:
        """Called after the optimizer's step, which :attr:`step` counts already."""

    def state_dict(self) -> dict:
        """Plain data and copies of tensors that a resumed run needs."""
        return deepcopy({name: getattr(self, name) for name in ('step', *self.stored)})

    def load_state_dict(self, state: Mapping) -> None:
        """The reverse of :meth:`state_dict`; tensors go to their adapters' devices."""
        self.step = state['step']
        for name in self.stored:
            values = {
                path: _copied(value, self.adapters[path]) for path, value in state[name].items()
            }
            setattr(self, name, values)

    def close(self) -> None:
        """Remove all hooks from the adapters."""


def _copied(value, adapter):
    if isinstance(value, Mapping):
        return {name: _copied(tensor, adapter) for name, tensor in value.items()}
    return value.to(adapter.device, copy=True)


def best(scores: Tensor, count: int) -> Tensor:
    """Where the ``count`` largest of n scores are, (n,); of equal ones the first, NaN last.

    ``count`` is from 1 to n.
    """
    scores = torch.where(scores.isnan(), -inf, scores)
    last = scores.topk(count).values[-1]
    above, level = scores > last, scores == last
    return above | (level & (level.cumsum(0) <= count - above.sum()))


def best_of_all(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Where the largest of all scores are, for each tensor; see :func:`best`."""
    device = next(iter(scores.values())).device
    flat = [value.flatten().to(device) for value in scores.values()]
    masks = best(torch.cat(flat), count).split([value.numel() for value in flat])
    return {
        path: mask.view(value.shape).to(value.device)
        for (path, value), mask in zip(scores.items(), masks, strict=True)
    }


def common_method(adapters: Mapping[str, Adapter], *names: str) -> Method:
    """The method of all adapters; UsageError if they differ in one of these arguments."""
    methods = [adapter.method for adapter in adapters.values()]
    for name in names:
        values = sorted({getattr(method, name) for method in methods})
        if len(values) > 1:
            raise UsageError(
                f'{type(methods[0]).__name__}: {name} governs the whole run and cannot differ '
                f'between weights, but has the values {", ".join(map(str, values))}. Take it out '
                'of targets.overrides and give it once, in the method.'
            )
    return methods[0]


def check_span(method: Method, name: str) -> None:
    """Raise UsageError unless an argument is a number of steps or a fraction of the run."""
    value = getattr(method, name)
    rule = (
        'is neither a number of steps, such as 500, nor a fraction of the run below 1, such as 0.1.'
    )
    require(method, name, value >= 0 if isinstance(value, int) else 0 <= value < 1, rule)


def span(value: int | float, steps: int) -> int:
    """Steps, from a number of them (int) or a fraction of the run (float)."""
    return value if isinstance(value, int) else round(value * steps)
