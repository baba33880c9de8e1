"""Methods that give an update dW, applied to the weight by :mod:`.updates`."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from .arguments import require
from .base import Factors, Method
from .channels import draw_input_dropout, per_input
from .normal_form import NormalForm
from .spec import WeightSpec
from .updates import UPDATES, Update


def root_mean_square(weights: Iterable[Tensor]) -> float:
    """Of all elements of some weights together; 0 if there are none, NaN on the meta device."""
    total = count = 0
    for weight in weights:
        if weight.is_meta:
            return float('nan')
        total += torch.linalg.vector_norm(weight.detach(), dtype=torch.float64).item() ** 2
        count += weight.numel()
    return (total / max(count, 1)) ** 0.5


@dataclass(frozen=True, kw_only=True)
class DeltaMethod(Method):
    """A method that gives an update dW of the weight's shape.

    phi(W) = update(W, scale * dW), with ``update`` of :mod:`.updates`.

    A Lie update multiplies dW by the weights, so that an optimizer step would
    move W less than the additive update does, by a factor of their size. Its
    default scale makes up for that: the scale of the additive update divided
    by the root mean square of all weights that an injection adapts, rounded
    to two digits. On the meta device, where weights have no values, it is the
    scale of the additive update.

    Attributes:
        scale: dW is multiplied by it; the default described above if None.
        dropout: Probability with which dW ignores an input channel during a
            training step. A channel is dropped at all positions alike, which
            makes the dropout of LoRA's branch a function of the weight.
        default_scale: The scale of the additive update if ``scale`` is None.
        scale_power: An optimizer step on W is proportional to this power of ``scale``.
    """

    default_scale: ClassVar[float] = 1.0
    scale_power: ClassVar[float] = 1.0

    update: Update = 'additive'
    scale: float | None = None
    dropout: float = 0.0

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if 'delta' in cls.__dict__ and 'low_rank' not in cls.__dict__:
            cls.low_rank = DeltaMethod.low_rank  # the inherited one is of another dW

    def __post_init__(self):
        super().__post_init__()
        require(self, 'dropout', 0 <= self.dropout < 1, 'is no probability below 1.')

    @property
    def scaling(self) -> float:
        """The factor before dW."""
        return self.default_scale if self.scale is None else self.scale

    @property
    def scale_is_open(self) -> bool:
        """Whether the arguments leave the scale to its default."""
        return self.scale is None

    def resolve(self, weights: Iterable[Tensor]) -> 'DeltaMethod':
        """The method with the default scale of a Lie update; see :class:`DeltaMethod`."""
        if self.update == 'additive' or not self.scale_is_open:
            return self
        size = root_mean_square(weights)
        if not 0 < size < float('inf'):
            return self
        return replace(self, scale=float(f'{self.scaling / size ** (1 / self.scale_power):.1e}'))

    def delta(self, factors: Factors, spec: WeightSpec) -> Tensor:
        """dW before scaling, of the weight's shape."""
        raise NotImplementedError

    def low_rank(
        self, factors: Factors, spec: WeightSpec
    ) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
        """``up``, ``core`` and ``down`` of the :class:`~.normal_form.NormalForm` of dW, unscaled.

        None if dW is not of this form, as on grouped and transposed convolutions.
        """
        return None

    def normal_form(self, factors, spec, training=False):
        thin = self.low_rank(factors, spec)
        if thin is None:
            return None
        dropout = self.dropout if training else 0.0
        return NormalForm(*thin, update=self.update, scale=self.scaling, dropout=dropout)

    def apply(self, weight: Tensor, factors: Factors, spec: WeightSpec, training=False) -> Tensor:
        """phi(W) = update(W, scale * dW)."""
        delta = self.delta(factors, spec)
        if training and self.dropout:
            delta = delta * per_input(draw_input_dropout(delta, spec, self.dropout), spec)
        return UPDATES[self.update](weight, delta, self.scaling)

    def definition(self):
        return super().definition() | dict(scale=self.scaling, alpha=None)

    @classmethod
    def modernize(cls, arguments, version):
        arguments = super().modernize(arguments, version)
        is_lie = arguments.get('update', cls.update) != 'additive'
        is_open = arguments.get('scale') is None and arguments.get('alpha') is None
        if version < (0, 4) and is_lie and is_open:
            arguments['scale'] = cls.default_scale
        return arguments
