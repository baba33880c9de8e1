"""Deciding during training where the parameters go."""

from collections.abc import Mapping
from math import inf

import torch
from torch import Tensor

from mmpeft.errors import UsageError

from .adapter import Adapter
from .base import Method


class Allocator:
    """Acts around every optimizer step on all adapters of one method.

    :func:`mmpeft.allocate` calls it through the optimizer's own hooks, so that
    gradient accumulation, gradient scaling and any training loop are right.

    Args:
        adapters: By path in the model; each adapter once.
        steps: Optimizer steps of the whole run.

    Attributes:
        step: Steps made so far.
    """

    def __init__(self, adapters: Mapping[str, Adapter], steps: int):
        self.adapters = dict(adapters)
        self.steps = steps
        self.step = 0

    def before_step(self) -> None:
        """Gradients are there; those set to None are not stepped on."""

    def after_step(self) -> None:
        """The optimizer has stepped; :attr:`step` counts this step already."""

    def state_dict(self) -> dict:
        """Plain data and tensors that a resumed run goes on from."""
        return dict(step=self.step)

    def load_state_dict(self, state: Mapping) -> None:
        """The reverse of :meth:`state_dict`."""
        self.step = state['step']

    def close(self) -> None:
        """Take off what was put on the adapters."""


def best(scores: Tensor, count: int) -> Tensor:
    """Where the largest scores are; of equal ones the first.

    Args:
        scores: (n,); NaN is the smallest.
        count: From 1 to n.

    Returns:
        (n,), true in exactly ``count`` places.
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
    """The method of adapters, which agree in the fields that the whole run follows.

    Raises:
        UsageError: They do not.
    """
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
    """Raise UsageError unless a field is a number of steps or a share of the run."""
    value = getattr(method, name)
    if not (isinstance(value, int) and value >= 0 or isinstance(value, float) and 0 <= value < 1):
        raise UsageError(
            f'{type(method).__name__}: {name}={value!r} is neither a number of steps, such as '
            '500, nor a share of the run below 1, such as 0.1.'
        )


def span(value: int | float, steps: int) -> int:
    """Steps, from a number of them (int) or a share of the run (float)."""
    return value if isinstance(value, int) else round(value * steps)
