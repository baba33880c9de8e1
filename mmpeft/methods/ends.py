"""The ends that all methods lie between: nothing trains, or everything."""

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


@register
class Full(Frozen):
    """Train the target module itself; BatchNorm statistics follow."""

    card = Card(
        family='ends',
        formula='W',
        suits='The ceiling to compare with, and plenty of data.',
    )

    trains_base = True
