"""Frozen: nothing trains, the lower end that all methods are compared with."""

from .base import Card, Method, register


@register
class Frozen(Method):
    """Freeze the target module and adapt nothing."""

    card = Card(
        family='ends',
        formula='W',
        suits='The floor to compare with: neck and heads alone train.',
    )

    adapts = False

    def accepts(self, spec):
        return False
