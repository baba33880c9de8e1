"""Methods whose size is governed by a rank."""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from mmpeft.errors import UsageError

from .arguments import require
from .base import Method
from .delta import AUTO, DeltaMethod
from .spec import WeightSpec


@dataclass(frozen=True, kw_only=True)
class Ranked(Method):
    """A method whose size is governed by a rank.

    In place of ``rank``, ``budget`` gives the number of parameters that all adapters
    together may have, such as ``'12.9M'``. The rank of the most parameters that fits is taken,
    for all weights or, by :meth:`gains`, for each its own.

    Attributes:
        grows: Whether parameters never fall with the rank.
    """

    grows: ClassVar[bool] = True

    rank: int = 8
    budget: int | float | str | None = None

    def __post_init__(self):
        super().__post_init__()
        ranks = (self.rank,) if isinstance(self.rank, int) else self.rank
        require(self, 'rank', min(ranks, default=0) > 0, 'must be a positive integer.')

    def max_rank(self, spec: WeightSpec) -> int:
        """The largest rank that makes sense for a weight: the size of its larger channel mode."""
        return max(spec.shape[:2])

    def with_rank(self, rank: int) -> 'Ranked':
        """The same method at another rank, its budget spent."""
        return replace(self, rank=rank, budget=None)

    def gains(self, weight: Tensor, gradient: Tensor, spec: WeightSpec) -> Tensor | None:
        """What each further rank adds to the squared norm that updates share with a gradient.

        Args:
            weight: W, of ``spec.shape``.
            gradient: dL/dW' where W' = W, likewise.
            spec: The role of the weight.

        Returns:
            (ranks,) in float64, from rank 1 to the highest that adds something; None where the
            method does not say.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class ScaledRankMethod(Ranked, DeltaMethod):
    """A method whose update is multiplied by ``scale`` or, in its place, by alpha / rank."""

    alpha: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.alpha is not None and self.scale is not None:
            raise UsageError(
                f'{type(self).__name__}: alpha={self.alpha} and scale={self.scale} say the same '
                'thing (scale = alpha / rank). Give one of them.'
            )

    @property
    def scaling(self):
        if self.alpha is not None:
            return self.alpha / self.rank
        # Not super().scaling, which torch.compile does not follow.
        return self.default_scale if self.scale in (None, AUTO) else self.scale

    @property
    def scale_is_open(self):
        return self.alpha is None and super().scale_is_open
