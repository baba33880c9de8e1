"""Methods that give an update dW, applied to the weight by :mod:`mmpeft.methods.updates`."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import inf, isnan, sqrt
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mmpeft.errors import UsageError

from .arguments import require
from .base import Factors, Method
from .channels import draw_input_dropout, per_input
from .normal_form import NormalForm
from .spec import WeightSpec
from .updates import UPDATES, Update

AUTO = 'auto'


def root_mean_square(weight: Tensor) -> float:
    """Of the elements of a weight; NaN on the meta device."""
    if weight.is_meta:
        return float('nan')
    norm = torch.linalg.vector_norm(
        weight.detach(), dtype=torch.promote_types(weight.dtype, torch.float64)
    ).item()
    return norm / sqrt(max(weight.numel(), 1))


@dataclass(frozen=True, kw_only=True)
class DeltaMethod(Method):
    """A method that gives an update dW of the weight's shape.

    phi(W) = update(W, scale * dW), with ``update`` of :mod:`mmpeft.methods.updates`.

    A Lie update multiplies dW by the weights, so that an optimizer step would
    move W less than the additive update does, by a factor of their size. Its
    default scale makes up for that: the scale of the additive update divided
    by the root mean square of all weights that an injection adapts, rounded
    to two digits. On the meta device, where weights have no values, it is the
    scale of the additive update.

    With ``scale='auto'`` the first step of Adam changes all adapted weights together as much, in
    Frobenius norm, as if they trained themselves at the same rate: s^2 sum(n c^2 w^2) = sum(n) over
    weights of n elements, with c of :meth:`first_step`, and w the root mean square of the weight in
    a Lie update, else 1. It is rounded to two digits too (docs/scale.md).

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
    scale: float | Literal['auto'] | None = None
    dropout: float = 0.0

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if 'delta' in cls.__dict__ and 'low_rank' not in cls.__dict__:
            cls.low_rank = DeltaMethod.low_rank  # the inherited one is of another dW
        if {'init', 'apply'} & cls.__dict__.keys() and 'first_step' not in cls.__dict__:
            cls.first_step = DeltaMethod.first_step  # likewise

    def __post_init__(self):
        super().__post_init__()
        require(self, 'dropout', 0 <= self.dropout < 1, 'must be at least 0 and below 1.')
        if self.scale == AUTO and type(self).first_step is DeltaMethod.first_step:
            raise UsageError(
                f"{type(self).__name__}: scale='auto' is derived for LoRA, LieRA and FLoRA alone. "
                'Write a number, or leave scale out.'
            )

    @property
    def scaling(self) -> float:
        """The factor before dW; the default where the scale is not resolved yet."""
        return self.default_scale if self.scale in (None, AUTO) else self.scale

    @property
    def scale_is_open(self) -> bool:
        """Whether the arguments leave the scale to its default."""
        return self.scale is None

    def resolve(self, weights: Iterable[tuple[Tensor, WeightSpec]]) -> 'DeltaMethod':
        """The method with a number for ``'auto'`` and for the default of a Lie update.

        See :class:`DeltaMethod`.

        Raises:
            UsageError: ``'auto'`` finds weights that are zero or infinite.
        """
        is_auto, is_lie = self.scale == AUTO, self.update != 'additive'
        if not (is_auto or is_lie and self.scale_is_open):
            return self
        square = count = 0
        for weight, spec in weights:
            move = self.first_step(spec) if is_auto else 1.0
            move *= root_mean_square(weight) if is_lie else 1.0
            square += weight.numel() * move**2
            count += weight.numel()
        size = sqrt(square / max(count, 1))
        if not 0 < size < inf:
            if is_auto and not isnan(size):
                raise UsageError(
                    f"{type(self).__name__}: scale='auto' follows from the weights that are "
                    'adapted, and they are zero or infinite. Load them first, or write a number.'
                )
            return self
        scale = (1.0 if is_auto else self.scaling) / size ** (1 / self.scale_power)
        return replace(self, scale=float(f'{scale:.1e}'))

    def update_gradient(self, weight: Tensor, gradient: Tensor, spec: WeightSpec) -> Tensor:
        """dL/d(dW) at dW = 0 and scale 1 from dL/dW', all of ``spec.shape``."""
        return gradient if self.update == 'additive' else gradient * weight

    def first_step(self, spec: WeightSpec) -> float:
        """c: by how much the first Adam step moves an entry of dW, for a rate and scale of 1.

        The root mean square over factors as they start and gradients of independent signs.
        """
        raise NotImplementedError

    def delta(self, factors: Factors, spec: WeightSpec) -> Tensor:
        """dW before scaling, of the weight's shape."""
        raise NotImplementedError

    def low_rank(
        self, factors: Factors, spec: WeightSpec
    ) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
        """``up``, ``core`` and ``down`` of the :class:`~.normal_form.NormalForm` of dW, unscaled.

        ``core`` has the axes of the kernel, also if it is of one element: (a, b, 1, 1). None if dW
        is not of this form, as on grouped and transposed convolutions.
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
