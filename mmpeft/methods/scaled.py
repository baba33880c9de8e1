"""What the kin of LoRA have in common: one rank, and a multiplier by alpha or scale."""

from dataclasses import dataclass
from typing import ClassVar

from mmpeft.errors import UsageError

from .base import RankMethod, check_choice


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
