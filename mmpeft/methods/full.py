"""Full: everything trains, the upper end that all methods are compared with."""

from .base import Card, register
from .frozen import Frozen


@register
class Full(Frozen):
    """Train the target module itself; BatchNorm statistics follow."""

    card = Card(
        family='ends',
        formula='W',
        trains='the target itself',
        paper='The upper end',
        cost='Gradients and optimizer state of every weight.',
        suits='The ceiling to compare with, and plenty of data.',
    )

    trains_base = True
