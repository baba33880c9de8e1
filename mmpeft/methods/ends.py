"""The two baselines: nothing in the backbone trains, or everything."""

from .base import Card, Method, register


@register
class Frozen(Method):
    """Freeze the target module and adapt nothing."""

    card = Card(
        family='ends',
        formula='W',
        suits='The lower baseline: only neck and heads train.',
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
        suits='The upper baseline, and plenty of data.',
    )

    trains_base = True
