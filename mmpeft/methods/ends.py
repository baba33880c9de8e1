"""The two ends that every method lies between: nothing trains, everything trains.

W' = W, frozen              Frozen
W' = W, trained             Full
"""

from dataclasses import dataclass
from typing import ClassVar

from mmpeft.registry import METHODS

from .base import Card, Method


@METHODS.register_module()
@dataclass(frozen=True, kw_only=True)
class Frozen(Method):
    """Freeze the target module and adapt nothing."""

    card: ClassVar = Card(
        family='ends',
        formula='W',
        trains='nothing in the target',
        paper='The lower end',
        cost='Nothing: the floor of time and memory.',
        suits='The floor to compare with: neck and heads alone train.',
    )

    adapts: ClassVar[bool] = False

    def accepts(self, spec):
        return False


@METHODS.register_module()
@dataclass(frozen=True, kw_only=True)
class Full(Frozen):
    """Train the target module itself; BatchNorm statistics follow."""

    card: ClassVar = Card(
        family='ends',
        formula='W',
        trains='the target itself',
        paper='The upper end',
        cost='Gradients and optimizer state of every weight.',
        suits='The ceiling to compare with, and plenty of data.',
    )

    trains_base: ClassVar[bool] = True
