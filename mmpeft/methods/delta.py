"""Methods that give an update dW, applied to the weight by :mod:`.updates`."""

from dataclasses import dataclass

from torch import Tensor

from mmpeft.errors import UsageError

from .base import Factors, Method, check_choice
from .channels import draw_input_dropout, per_input
from .normal_form import NormalForm
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
            cls.low_rank = DeltaMethod.low_rank  # the inherited one is of another dW

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
        """dW before scaling as thin factors of its channel modes, if it has them.

        Returns:
            ``up``, ``core`` and ``down`` of a :class:`~.normal_form.NormalForm`; None if dW is
            not of this form, as on grouped and transposed convolutions.
        """
        return None

    def normal_form(self, factors, spec, training=False):
        thin = self.low_rank(factors, spec)
        if thin is None:
            return None
        dropout = self.dropout if training else 0.0
        return NormalForm(*thin, update=self.update, scale=self.scaling, dropout=dropout)

    def apply(self, weight: Tensor, factors: Factors, spec: WeightSpec, training=False) -> Tensor:
        """phi(W) = update(W, scaling * dW)."""
        delta = self.scaling * self.delta(factors, spec)
        if training and self.dropout:
            delta = delta * per_input(draw_input_dropout(delta, spec, self.dropout), spec)
        return UPDATES[self.update](weight, delta)
