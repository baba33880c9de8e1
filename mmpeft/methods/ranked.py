"""Methods whose size is governed by a rank, and those of them that give an update dW."""

from dataclasses import dataclass, replace
from typing import ClassVar

from mmpeft.errors import UsageError

from .base import Method, check_choice
from .delta import DeltaMethod
from .spec import WeightSpec


@dataclass(frozen=True, kw_only=True)
class Ranked(Method):
    """A method whose size is governed by a rank.

    Attributes:
        rank: The rank, as the method understands it.
        budget: In place of ``rank``: the number of parameters that all
            adapters together may have, such as ``'12.9M'``. The largest rank
            that fits is taken.
    """

    rank: int | tuple[int, ...] = 8
    budget: int | str | None = None

    def __post_init__(self):
        if hasattr(super(), '__post_init__'):
            super().__post_init__()
        ranks = (self.rank,) if isinstance(self.rank, int) else tuple(self.rank)
        object.__setattr__(self, 'rank', self.rank if isinstance(self.rank, int) else ranks)
        if not ranks or any(not isinstance(r, int) or r < 1 for r in ranks):
            raise UsageError(
                f'{type(self).__name__}: rank={self.rank!r} must be a positive integer'
                ' or one positive integer a mode.'
            )

    def max_rank(self, spec: WeightSpec) -> int:
        """The size of the weight's largest channel mode; no rank beyond it makes sense."""
        return max(spec.in_features, spec.out_features)

    def with_rank(self, rank: int) -> 'Ranked':
        """The same method at another rank, its budget spent."""
        return replace(self, rank=rank, budget=None)


@dataclass(frozen=True, kw_only=True)
class RankMethod(Ranked, DeltaMethod):
    """A method that gives an update dW of a rank."""


@dataclass(frozen=True, kw_only=True)
class ScaledRankMethod(RankMethod):
    """A method of one rank whose update is multiplied by alpha / rank or by scale.

    Attributes:
        layouts: What ``layout`` may be.
        rank: r.
        alpha: dW is multiplied by alpha / rank.
        scale: In place of ``alpha``, the multiplier itself; 1 with neither.
        layout: How the method takes a kernel.
    """

    layouts: ClassVar[tuple[str, ...]]

    rank: int = 8
    alpha: float | None = None
    scale: float | None = None
    layout: str = 'channel'

    def __post_init__(self):
        super().__post_init__()
        check_choice(self, 'layout', self.layouts)
        if not isinstance(self.rank, int):
            raise UsageError(f'{type(self).__name__}: rank={self.rank!r} must be one integer.')
        if self.alpha is not None and self.scale is not None:
            raise UsageError(
                f'{type(self).__name__}: alpha={self.alpha} and scale={self.scale} say the same '
                'thing (scale = alpha / rank). Give one of them.'
            )

    @property
    def scaling(self):
        if self.scale is not None:
            return self.scale
        return 1.0 if self.alpha is None else self.alpha / self.rank
