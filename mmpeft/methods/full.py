"""Full: everything trains, the upper end that all methods are compared with."""

from .base import Card, register
from .frozen import Frozen


@register
class Full(Frozen):
    """Train the target module itself; BatchNorm statistics follow."""

    card = Card(
        family='ends',
        formula='W',
        suits='The ceiling to compare with, and plenty of data.',
    )

    trains_base = True
