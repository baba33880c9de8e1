"""Methods that give an update dW, applied to the weight by :mod:`.updates`."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mmpeft.errors import UsageError

from .base import Factors, Method, check_choice
from .spec import WeightSpec
from .updates import UPDATES


@dataclass(frozen=True, kw_only=True)
class DeltaMethod(Method):
    """A method that gives an update dW of the weight's shape.

    phi(W) = update(W, scaling * dW), with ``update`` of :mod:`.updates`.

    Attributes:
        update: ``'additive'``, ``'lie'`` or ``'lie_exact'``.
        dropout: Probability with which dW ignores an input channel during a
            training step. A channel is dropped at all positions alike, which
            makes the dropout of LoRA's branch a function of the weight.
    """

    update: str = 'additive'
    dropout: float = 0.0

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if 'delta' in cls.__dict__ and 'low_rank' not in cls.__dict__:
            cls.low_rank = DeltaMethod.low_rank  # an inherited one is of another dW

    def __post_init__(self):
        check_choice(self, 'update', UPDATES)
        if not 0 <= self.dropout < 1:
            raise UsageError(
                f'{type(self).__name__}: dropout={self.dropout} is no probability below 1.'
            )

    @property
    def scaling(self) -> float:
        """The factor before dW."""
        return 1.0

    def delta(self, factors: Factors, spec: WeightSpec) -> Tensor:
        """dW before scaling, of the weight's shape."""
        raise NotImplementedError

    def low_rank(
        self, factors: Factors, spec: WeightSpec
    ) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
        """dW before scaling by thin factors of its channel modes, which is faster to train.

        dW[o, i, k] = sum_ab U[o, a] G[a, b, k] V[b, i].

        Returns:
            U (out, a); G (a, b, *kernel) or None for the identity without a
            kernel; V (b, in) or None for the identity. None if dW is not of
            this form, as on grouped and transposed convolutions.
        """
        return None

    def apply(self, weight: Tensor, factors: Factors, spec: WeightSpec, training=False) -> Tensor:
        """phi(W) = update(W, scaling * dW)."""
        delta = self.scaling * self.delta(factors, spec)
        if training and self.dropout:
            delta = delta * input_dropout_mask(delta, spec, self.dropout)
        return UPDATES[self.update](weight, delta)


def input_dropout_mask(weight: Tensor, spec: WeightSpec, p: float) -> Tensor:
    """A random 0 or 1 / (1 - p) for each input channel, shaped to multiply a weight.

    Args:
        weight: Gives dtype and device.
        spec: The weight's role; a grouped convolution's rows see the channels
            of their own group.
        p: Probability of 0.

    Returns:
        Broadcastable to ``spec.shape``.
    """
    keep = torch.full((spec.in_features,), 1 - p, dtype=weight.dtype, device=weight.device)
    mask = torch.bernoulli(keep) / (1 - p)
    ones = (1,) * len(spec.kernel_size)
    if len(spec.shape) == 1:
        return mask
    if spec.input_first:
        return mask.view(-1, 1, *ones)
    rows = mask.view(spec.groups, 1, -1).expand(-1, spec.shape[0] // spec.groups, -1)
    return rows.reshape(spec.shape[0], -1, *ones)
