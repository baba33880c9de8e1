"""The two ends that every method lies between: nothing trains, everything trains.

W' = W, frozen              Frozen
W' = W, trained             Full
"""

from dataclasses import dataclass
from typing import ClassVar

from mmpeft.registry import METHODS

from .base import Method


@METHODS.register_module()
@dataclass(frozen=True, kw_only=True)
class Frozen(Method):
    """Freeze the target module and adapt nothing."""

    adapts: ClassVar[bool] = False

    def accepts(self, spec):
        return False


@METHODS.register_module()
@dataclass(frozen=True, kw_only=True)
class Full(Frozen):
    """Train the target module itself; BatchNorm statistics follow."""

    trains_base: ClassVar[bool] = True
